"""Versions that are kept, rolled back and pruned; what deletions say; tenants; events; backups; cycles without end."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from bench.million.files import SyntheticAdapters

from overtone.adapters import AdapterStore
from overtone.adapters.maintenance import Maintenance
from overtone.adapters.operations import Event, ImportItem
from overtone.adapters.store import Wanted
from overtone.errors import AdapterNotFound, ConfigError, EtagMismatch
from support.adapters import SHAPES, adapter_files, make_loca_folder, open_store, put
from support.stored import assert_same_deltas, places_on_disk, versions_on_disk

Make = Callable[[int], Path]


def test_versions_beyond_the_limit_go_the_oldest_first(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path / "s", keep_versions=2)) as store:
        first, second, third = (put(store, loca(seed), "a").digest for seed in (1, 2, 3))
        assert store.get("a").versions == (third, second)
        with pytest.raises(AdapterNotFound, match=first[:12]):
            store.acquire(f"a@{first[:12]}")
        assert versions_on_disk(tmp_path / "s") == sorted([second, third])
        with store.acquire(f"a@{second[:12]}") as held:
            fourth = put(store, loca(4), "a").digest
            assert held.adapter.digest == second
            assert held.adapter.deltas.keys() == SHAPES.keys()
            assert store.get("a").versions == (fourth, third)
            assert second in versions_on_disk(tmp_path / "s")
        assert versions_on_disk(tmp_path / "s") == sorted([third, fourth])


def test_a_rollback_is_atomic_and_can_be_taken_back(store: AdapterStore, loca: Make) -> None:
    one, two = (put(store, loca(seed), "a").digest for seed in (1, 2))
    with store.acquire("a") as running:
        back = store.activate("a")
        assert back.digest == one
        assert set(back.versions) == {one, two}
        assert running.adapter.digest == two
        with store.acquire("a") as now:
            assert now.adapter.digest == one
    assert store.activate("a").digest == two
    assert store.activate("a", one[:12], etag=store.get("a").etag).digest == one
    with pytest.raises(EtagMismatch):
        store.activate("a", two[:12], etag=back.etag)
    with pytest.raises(AdapterNotFound):
        store.activate("a", "0" * 12)
    assert store.get("a").digest == one


def test_a_pinned_id_keeps_the_version_it_means_in_memory(store: AdapterStore, loca: Make) -> None:
    one, two = (put(store, loca(seed), "a", pinned=True).digest for seed in (1, 2))
    assert store.residency_state(two) == "resident"
    store.activate("a")
    assert store.residency_state(one) == "resident"


def test_a_deletion_says_what_it_frees_and_when(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    sizes = {digest: place.length for digest, place in places_on_disk(store._config.root).items()}
    freed = store.delete("a")
    assert (freed.freed_bytes, freed.pending_bytes, freed.leases) == (sum(sizes.values()), 0, 0)

    record = put(store, loca(1), "a")
    leases = [store.acquire("a") for _ in range(3)]
    told: list[str] = []
    store.on_freed(told.append)
    pending = store.delete("a")
    assert (pending.freed_bytes, pending.pending_bytes, pending.leases) == (0, sizes[record.digest], 3)
    for lease in leases:
        assert told == []
        assert versions_on_disk(store._config.root) == [record.digest]
        lease.release()
    assert told == [record.digest]
    assert places_on_disk(store._config.root) == {}
    assert store.stats().resident_bytes == 0


def test_content_of_another_id_is_not_freed(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    put(store, loca(1), "b")
    assert store.delete("a").freed_bytes == 0
    assert store.delete("b").freed_bytes > 0


def test_nobody_learns_what_another_tenant_has(store: AdapterStore, loca: Make) -> None:
    record = put(store, loca(1), "hers", tenant="anna")
    put(store, loca(2), "everybodys")
    wanted = [Wanted("hers")]

    def begin(tenant: str) -> None:
        store.begin(wanted, tenant).release()

    calls: list[Callable[[str], object]] = [
        lambda tenant: store.acquire_all(wanted, tenant).release(),
        begin,
        lambda tenant: (found := store.acquire_resident(wanted, tenant)) and found.release(),
        lambda tenant: store.acquire_all([Wanted(f"hers@{record.digest}")], tenant).release(),
        lambda tenant: store.acquire_all([Wanted("everybodys"), Wanted("hers", weight=0.5)], tenant).release(),
    ]
    for call in calls:
        call("anna")
        for tenant in ("", "bert"):
            with pytest.raises(AdapterNotFound) as theirs:
                call(tenant)
            with pytest.raises(AdapterNotFound) as nobodys:
                store.acquire("nobody")
            assert theirs.value.message.replace("hers", "nobody") == nobodys.value.message
    for tenant in ("anna", "bert", ""):
        store.acquire_all([Wanted("everybodys")], tenant).release()
    assert store.stats().leased_count == 0


def test_events_come_in_the_order_of_the_changes(store: AdapterStore, loca: Make) -> None:
    heard: list[Event] = []
    end = store.subscribe(heard.append)
    put(store, loca(1), "a")
    put(store, loca(1), "a")  # nothing has changed
    put(store, loca(2), "a")
    store.activate("a")
    store.update("a", labels={"k": "v"})
    store.update("a", labels={"k": "v"})  # nothing either
    store.import_many([ImportItem(name, adapter_files(loca(3))) for name in ("a", "b", "b")])
    store.delete("a")
    end()
    store.delete("b")
    wanted = ["created", "updated", "updated", "updated", "updated", "created", "deleted"]
    assert [(event.kind, event.adapter_id) for event in heard] == list(zip(wanted, "aaaaaba", strict=True))
    assert all(after.sequence == before.sequence + 1 for before, after in pairwise(heard))
    assert all(event.record is None or event.record.id == event.adapter_id for event in heard)
    assert [event.record is None for event in heard] == [False, False, False, False, True, True, False]


def test_a_listener_that_fails_harms_nothing(store: AdapterStore, loca: Make) -> None:
    def bad(event: Event) -> None:
        raise RuntimeError("no")

    heard: list[Event] = []
    store.subscribe(bad)
    store.subscribe(heard.append)
    put(store, loca(1), "a")
    assert [event.kind for event in heard] == ["created"]


def test_last_use_is_written_down(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path / "s")) as store:
        for name in "ab":
            put(store, loca(1), name)
        store.acquire("a").release()
        assert store.get("a").last_used_time is None
        store.flush()
        used = store.get("a")
        assert used.last_used_time is not None
        assert used.last_used_time >= used.create_time
        assert used.etag == store.list(0)[0][0].etag
        assert store.get("b").last_used_time is None
        store.acquire("b").release()
    with closing(open_store(tmp_path / "s")) as store:
        assert store.get("b").last_used_time is not None


def test_a_backup_serves(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path / "s", pack_bytes=1 << 12)) as store:
        for seed in range(5):
            put(store, loca(seed), f"a{seed % 3}", labels={"seed": str(seed)})
        store.delete("a2")
        with store.acquire("a1") as lease:
            done: list[tuple[int, int]] = []
            store.backup(tmp_path / "copy", lambda *now: done.append(now))
            assert done[-1][0] == done[-1][1]
            with pytest.raises(ConfigError, match="not empty"):
                store.backup(tmp_path / "copy")
            put(store, loca(9), "later")
            with closing(open_store(tmp_path / "copy")) as copy:
                assert not copy.check(deep=True)
                assert [record.id for record in copy.list(0)[0]] == ["a0", "a1"]
                assert copy.get("a1") == replace(store.get("a1"), last_used_time=copy.get("a1").last_used_time)
                with copy.acquire("a1") as other:
                    assert_same_deltas(other.adapter.deltas, lease.adapter.deltas)


def test_a_closed_store_is_kept_by_hand(tmp_path: Path, loca: Make) -> None:
    with pytest.raises(ConfigError, match="no adapter store"):
        Maintenance(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    store = open_store(tmp_path / "s", pack_bytes=1 << 12)
    for seed in range(20):
        put(store, loca(seed), f"a{seed}")
    with pytest.raises(ConfigError):
        Maintenance(tmp_path / "s")
    for seed in range(0, 20, 2):
        store.delete(f"a{seed}")
    store.close()
    with Maintenance(tmp_path / "s") as upkeep:
        before = upkeep.stats()
        assert (before.registered_count, before.version_count, before.quarantined_count) == (10, 10, 0)
        done = upkeep.compact(below=1.0)
        after = upkeep.stats()
        assert 0 < before.disk_bytes - after.disk_bytes <= done.freed_bytes
        assert not upkeep.check(deep=True)
        upkeep.backup(tmp_path / "copy")
    for root in ("s", "copy"):
        with closing(open_store(tmp_path / root)) as again:
            assert [again.get(f"a{seed}").id for seed in range(1, 20, 2)]
            again.acquire("a19").release()


@contextmanager
def cycling(root: Path) -> Iterator[tuple[AdapterStore, Callable[[int, int], None]]]:
    """A store with an adapter that stays, and what loads, uses and deletes others: LoCA with shared locations and with its
    own, and FourierFT, each its own content."""
    made = SyntheticAdapters(SHAPES, 12)
    with closing(open_store(root / "s", pack_bytes=1 << 20)) as store:
        put(store, make_loca_folder(root / "stays", SHAPES, n=4, seed=1), "stays")

        def cycle(first: int, until: int) -> None:
            for number in range(first, until):
                files = made.files(number)
                with store.begin_upload() as upload:
                    upload.write(files.layout.config, files.config)
                    upload.write(files.layout.weights, files.weights)
                    store.commit_upload(upload, f"c{number}")
                store.acquire(f"c{number}").release()
                assert store.delete(f"c{number}").leases == 0

        yield store, cycle


def rss_bytes() -> int:
    """Of this process: what it keeps for itself."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_cycles(root: Path, count: int) -> None:
    with cycling(root) as (store, cycle):
        warm = max(100, count // 10)
        cycle(0, warm)
        store.compact(below=1.0)
        before, stats = rss_bytes(), store.stats()
        cycle(warm, count)
        store.compact(below=1.0)
        after = store.stats()
        for name in (
            "registered_count",
            "resident_count",
            "resident_bytes",
            "leased_count",
            "version_count",
            "live_bytes",
        ):
            assert getattr(after, name) == getattr(stats, name), name
        assert after.disk_bytes < 1 << 20
        # What loads share is kept for the next ones, up to a bound.
        grown = after.memo_bytes - stats.memo_bytes
        assert grown < 64 << 20
        assert rss_bytes() - before < grown + (8 << 20)
        assert not store.check(deep=True)
        store.acquire("stays").release()


def test_load_use_delete(tmp_path: Path) -> None:
    check_cycles(tmp_path, 500)


@pytest.mark.slow
def test_ten_thousand_times_load_use_delete(tmp_path: Path) -> None:
    check_cycles(tmp_path, 10_000)
