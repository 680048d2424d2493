"""Leases on the event loop while fetches are stuck: who waits, who does not, and how many threads it costs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters import AdapterStore, Lease
from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.store import Wanted
from overtone.api.leases import Leases
from overtone.errors import AdapterNotFound, StoreFailed
from support.adapters import SHAPES, adapter_files, make_loca_folder, open_store, put

FETCHES = 3


class Disk:
    """Adapters a0 to a5 in a store whose reads stick for the adapters that were named, until `free`."""

    def __init__(self, path: Path) -> None:
        self.store: AdapterStore = open_store(path / "store")
        self.folders = [make_loca_folder(path / f"a{i}", SHAPES, n=3, seed=i) for i in range(6)]
        self.digests = [put(self.store, folder, f"a{i}").digest for i, folder in enumerate(self.folders)]
        for digest in self.digests:
            assert self.store._versions.residency.drop(digest)  # from the upload
        self.stuck: set[str] = set()
        self.broken: set[str] = set()
        self.reads: Counter[str] = Counter()
        self.free = threading.Event()
        self.news = threading.Condition()
        self._read, self.store._versions.read = self.store._versions.read, self.read  # type: ignore[method-assign]

    def read(self, digest: str) -> ResidentAdapter:
        with self.news:
            self.reads[digest] += 1
            self.news.notify_all()
        if digest in self.stuck:
            assert self.free.wait(60)
        if digest in self.broken:
            raise StoreFailed("the disk is gone")
        return self._read(digest)

    def stick(self, *numbers: int) -> None:
        self.stuck |= {self.digests[i] for i in numbers}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def with_leases(disk: Disk, work: Any) -> None:
    """Runs `work(leases)` and checks that nothing stays leased."""

    async def run() -> None:
        leases = Leases(disk.store, FETCHES, None)
        try:
            await asyncio.wait_for(work(leases), 60)
        finally:
            disk.free.set()
            await asyncio.to_thread(leases.close)
        await asyncio.sleep(0)
        assert not leases._fetching

    asyncio.run(run())
    assert disk.store.stats().leased_count == 0


def start(leases: Leases, *wanted: Wanted) -> asyncio.Task[Lease]:
    return asyncio.ensure_future(leases.acquire(wanted))


async def until_read(disk: Disk, *numbers: int) -> None:
    def wait() -> None:
        with disk.news:
            assert disk.news.wait_for(lambda: all(disk.reads[disk.digests[i]] for i in numbers), 60)

    await asyncio.to_thread(wait)


def until_leased(disk: Disk, number: int, times: int) -> None:
    entries = disk.store._versions.residency._entries
    while disk.digests[number] not in entries or entries[disk.digests[number]].leases < times:
        pass


async def served(lease: Coroutine[Any, Any, Lease] | asyncio.Task[Lease]) -> tuple[str, ...]:
    with await lease as held:
        return tuple(share.adapter_id for share in held.shares)


def test_many_that_want_a_stuck_adapter_take_one_thread(disk: Disk) -> None:
    """By whatever name, alone or in sums, and though most give up: another adapter that is on the disk is read."""

    async def work(leases: Leases) -> None:
        disk.stick(0)
        names = ["a0", *(f"a0@{disk.digests[0][:length]}" for length in range(12, 40))]
        waiting = [start(leases, Wanted(name)) for name in names]
        waiting += [start(leases, Wanted("a1"), Wanted(name, weight=0.5)) for name in names]
        await until_read(disk, 0, 1)
        for task in waiting[::2]:
            task.cancel()
        await asyncio.wait(waiting[::2])
        waiting += [start(leases, Wanted("a0")) for _ in range(20)]
        assert await served(leases.acquire([Wanted("a2")])) == ("a2",)
        assert await served(leases.acquire([Wanted("a1"), Wanted("a2")])) != ()
        assert not any(task.done() for task in waiting[1::2])
        disk.free.set()
        for task in waiting:
            if not task.cancelled():
                assert "a0" in await served(task)
        assert disk.reads == dict.fromkeys(disk.digests[:3], 1)

    with_leases(disk, work)


def test_what_is_in_memory_or_comes_along_never_waits(disk: Disk) -> None:
    """Every fetching thread is stuck, and one more adapter has to wait for them; nobody else does."""

    async def work(leases: Leases) -> None:
        for name in ("a4", "a5"):
            await served(leases.acquire([Wanted(name)]))
        disk.stick(0, 1, 2)
        stuck = [start(leases, Wanted(f"a{i}")) for i in range(FETCHES)]
        await until_read(disk, 0, 1, 2)
        behind = start(leases, Wanted("a3"))
        same = [start(leases, Wanted(files=adapter_files(disk.folders[0]))) for _ in range(4)]
        for _ in range(5):
            assert await served(leases.acquire([Wanted("a4")])) == ("a4",)
            assert sorted(await served(leases.acquire([Wanted("a4"), Wanted("a5")]))) == ["a4", "a5"]
            assert await served(leases.acquire([Wanted("a5", weight=2.0)])) == ("a5",)
            assert await served(leases.acquire([Wanted(files=adapter_files(disk.folders[3]))])) == ("",)
        mixed = start(leases, Wanted("a0"), Wanted(files=adapter_files(disk.folders[4])))
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in (*stuck, *same, behind, mixed))
        disk.free.set()
        for task in (*stuck, *same, behind, mixed):
            await served(task)

    with_leases(disk, work)


def test_a_failed_fetch_fails_all_who_wait_and_nobody_later(disk: Disk) -> None:
    async def work(leases: Leases) -> None:
        disk.stick(0)
        disk.broken.add(disk.digests[0])
        waiting = [start(leases, Wanted("a0")), start(leases, Wanted("a1"), Wanted("a0"))]
        await until_read(disk, 0)
        disk.free.set()
        for task in waiting:
            with pytest.raises(StoreFailed):
                await task
        disk.broken.clear()
        assert await served(leases.acquire([Wanted("a0")])) == ("a0",)
        with pytest.raises(AdapterNotFound):
            await leases.acquire([Wanted("a0"), Wanted("gone")])

    with_leases(disk, work)


def test_the_store_is_told_whose_request_it_is(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, tenants = disk.store.begin, list[str]()

    def told(wanted: Any, tenant: str = "") -> Any:
        tenants.append(tenant)
        return begin(wanted, tenant)

    async def work(leases: Leases) -> None:
        monkeypatch.setattr(disk.store, "begin", told)
        (await leases.acquire([Wanted("a0")], "anna")).release()
        (await leases.acquire([Wanted("a1")])).release()

    with_leases(disk, work)
    assert tenants == ["anna", ""]


def test_deleted_while_it_is_fetched(disk: Disk) -> None:
    """Whoever asked before has it still."""

    async def work(leases: Leases) -> None:
        disk.stick(0)
        task = start(leases, Wanted("a0"))
        await until_read(disk, 0)
        await asyncio.to_thread(disk.store.delete, "a0")
        disk.free.set()
        assert await served(task) == ("a0",)
        with pytest.raises(AdapterNotFound):
            await leases.acquire([Wanted("a0")])

    with_leases(disk, work)


def test_what_was_looked_up_and_is_in_memory_costs_no_thread(disk: Disk) -> None:
    async def work(leases: Leases) -> None:
        wanted = [Wanted("a0")], [Wanted(f"a1@{disk.digests[1][:12]}")], [Wanted("a0"), Wanted("a1", weight=0.5)]
        before = [await leases.acquire(one) for one in wanted]
        hops = Counter[str]()
        for name in ("_ready", "_fetch", "_compute"):
            submit = getattr(leases, name).submit

            def counted(*args: Any, name: str = name, submit: Any = submit) -> Any:
                hops[name] += 1
                return submit(*args)

            getattr(leases, name).submit = counted
        for one, lease in zip(wanted, before, strict=True):
            with await leases.acquire(one) as again:
                assert again.adapter is lease.adapter
            lease.release()
        assert not hops
        await served(leases.acquire([Wanted(f"a0@{disk.digests[0][:20]}")]))
        assert hops == {"_ready": 1}, "in memory, but not by this name"

    with_leases(disk, work)


def test_a_request_is_a_hit_or_a_miss(disk: Disk) -> None:
    async def work(leases: Leases) -> None:
        for _ in range(3):
            await served(leases.acquire([Wanted("a0")]))
        disk.stick(1)
        waiting = [start(leases, Wanted("a1")) for _ in range(3)]
        await asyncio.to_thread(until_leased, disk, 1, 4)  # theirs and that of the fetch
        disk.free.set()
        for task in waiting:
            await served(task)

    with_leases(disk, work)
    stats = disk.store.stats()
    assert (stats.hit_count, stats.miss_count, stats.disk_load_count) == (2, 4, 2)


def test_what_is_given_up_on_its_way_is_not_kept(disk: Disk) -> None:
    """Wherever it is: not begun, looked up, fetched, there, or failed."""

    async def give_up(leases: Leases, *wanted: Wanted, after: Coroutine[Any, Any, None] | None = None) -> None:
        with contextlib.suppress(ZeroDivisionError), leases.ahead(wanted):
            if after is not None:
                await after
            raise ZeroDivisionError

    async def work(leases: Leases) -> None:
        disk.stick(0)
        await give_up(leases, Wanted("a0"))
        await give_up(leases, Wanted("a0"), after=asyncio.sleep(0))
        await give_up(leases, Wanted("a0"), Wanted("a1"), after=until_read(disk, 0))
        disk.free.set()
        held = await leases.acquire([Wanted("a1")])
        await give_up(leases, Wanted("a1"))
        await give_up(leases, Wanted("a1"), after=asyncio.sleep(0))
        await give_up(leases, Wanted("gone"), after=asyncio.sleep(0.02))
        await give_up(leases)
        held.release()
        with leases.ahead([Wanted("a1")]) as coming, leases.ahead([]) as nothing:
            lease = await coming.lease()
            assert await nothing.lease() is None
        assert lease is not None
        assert disk.store.stats().leased_count >= 1
        lease.release()

    with_leases(disk, work)


def test_whoever_waits_for_what_is_on_its_way_may_be_cancelled(disk: Disk) -> None:
    async def work(leases: Leases) -> None:
        async def request() -> None:
            with leases.ahead([Wanted("a0")]) as coming:
                await coming.lease()

        disk.stick(0)
        waiting = [asyncio.ensure_future(request()) for _ in range(3)]
        await until_read(disk, 0)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert all(task.cancelled() for task in waiting)

    with_leases(disk, work)
