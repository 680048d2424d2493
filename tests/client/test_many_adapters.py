"""Both clients against the real control plane: imports, watches, versions, statistics, export, the store."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.adapters.operations import Problem
from overtone.api import imports
from overtone.api.usage import Measured
from overtone.client import (
    AdapterNotFound,
    AsyncClient,
    Client,
    Deletion,
    ImportEntry,
    InvalidAdapter,
    InvalidRequest,
    StoreFailed,
    TooLarge,
    WatchExpired,
    _batches,
    _imports,
)
from overtone.client._batches import MAX_ENTRIES, batches
from overtone.client._channel import ADAPTERS, _service_config
from overtone.client._imports import IN_FLIGHT
from overtone.v1 import adapters_pb2
from support.control_plane import ControlPlane
from support.fake_server import Driver


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path) as plane:
        yield plane


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, plane: ControlPlane) -> Iterator[Driver]:
    async def connect() -> AsyncClient:
        return AsyncClient(plane.address)

    driver = Driver(connect if request.param == "asyncio" else lambda: Client(plane.address))
    yield driver
    driver.close()


def entry(adapter_id: str, weights: bytes = b"1", **more: Any) -> ImportEntry:
    return ImportEntry(adapter_id, {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}, **more)


def test_results_come_in_the_order_of_the_entries(ask: Driver, plane: ControlPlane) -> None:
    large = entry("large", b"1" * (9 << 20))
    entries = [entry(f"a{i}", b"bad" if i % 100 == 7 else b"1") for i in range(700)]
    results = ask(lambda client: client.adapters.import_many([*entries[:300], large, *entries[300:]]))
    assert [result.id for result in results] == [
        *(f"a{i}" for i in range(300)),
        "large",
        *(f"a{i}" for i in range(300, 700)),
    ]
    refused = {result.id: result.error for result in results if result.outcome == "refused"}
    assert refused.keys() == {"large", *(f"a{i}" for i in range(7, 700, 100))}
    assert isinstance(refused["large"], TooLarge)
    error = refused["a107"]
    assert isinstance(error, InvalidAdapter)
    assert (error.field, error.message) == ("spectrum", "spectrum has 3 numbers, not 4")
    assert {result.outcome for result in results} == {"created", "refused"}
    assert len(plane.store.records) == 693
    assert len(plane.store.batches) < 10


def test_labels_and_tenants_travel(ask: Driver, plane: ControlPlane) -> None:
    made = [entry("a", labels={"k": "v"}, tenant="anna"), entry("b")]
    (first, second) = ask(lambda client: client.adapters.import_many(made))
    assert (first.outcome, second.digest) == ("created", plane.store.get("b").digest)
    assert [(r.labels, r.tenant) for r in plane.store.records.values()] == [({"k": "v"}, "anna"), ({}, "")]
    (again,) = ask(lambda client: client.adapters.import_many([entry("a")]))
    assert again.outcome == "unchanged"
    assert plane.store.get("a").tenant == "anna"


def test_what_the_entries_raise_is_raised(ask: Driver, plane: ControlPlane) -> None:
    def broken() -> Iterator[ImportEntry]:
        yield entry("a")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        ask(lambda client: client.adapters.import_many(broken()))


def test_what_ends_the_import_is_raised(ask: Driver, plane: ControlPlane) -> None:
    with pytest.raises(StoreFailed, match="the disk is full"):
        ask(lambda client: client.adapters.import_many([entry("a", b"broken")]))
    assert ask(lambda client: client.adapters.import_many([])) == []


def test_entries_are_taken_only_some_way_ahead(plane: ControlPlane) -> None:
    taken, most = [0], threading.Event()

    def endless() -> Iterator[ImportEntry]:
        while True:
            taken[0] += 1
            if taken[0] > (IN_FLIGHT + 1) * MAX_ENTRIES:
                most.set()
            yield entry(f"a{taken[0]}")

    with plane.client() as client, closing(client.adapters.import_many(endless())) as results:
        for seen, _ in enumerate(islice(results, 5 * MAX_ENTRIES)):
            assert taken[0] <= seen + (IN_FLIGHT + 2) * MAX_ENTRIES
        assert most.wait(60)
    plane.call(plane.calls.wait_idle(60))


def test_an_async_import_may_be_left(plane: ControlPlane) -> None:
    async def some() -> list[str]:
        async with AsyncClient(plane.address) as client:
            names = (entry(f"a{i}") for i in range(10**6))
            async with aclosing(client.adapters.import_many(names)) as results:
                return [(await anext(results)).id for _ in range(3)]

    assert asyncio.run(some()) == ["a0", "a1", "a2"]
    plane.call(plane.calls.wait_idle(60))


@given(st.lists(st.integers(0, 3 << 19), max_size=40))
def test_batches_are_bounded(sizes: list[int]) -> None:
    entries = [ImportEntry(str(i), {"f": bytes(size)}) for i, size in enumerate(sizes)]
    made = list(batches(entries))
    assert [each.id for batch in made for each in batch.entries] == [each.id for each in entries]
    for batch in made:
        assert 1 <= len(batch.entries) <= MAX_ENTRIES
        assert batch.nbytes == sum(len(each.files["f"]) for each in batch.entries)
        assert batch.nbytes <= 1 << 20 or len(batch.entries) == 1


def test_watching(ask: Driver, plane: ControlPlane) -> None:
    plane.store.import_many([])
    with plane.client() as other:
        list(other.adapters.import_many([entry("before")]))

        async def follow(client: AsyncClient) -> list[Any]:
            async with aclosing(client.adapters.watch(snapshot=True)) as updates:
                return await _follow(updates, other)

        if isinstance(ask.client, Client):
            with closing(ask.client.adapters.watch(snapshot=True)) as updates:
                seen = asyncio.run(_follow(_async(updates), other))
        else:
            seen = ask(follow)
    assert [(event.kind, event.id) for event in seen] == [
        ("existing", "before"), ("created", "new"), ("deleted", "before"),
    ]  # fmt: skip
    assert seen[1].adapter.state == "stored"
    assert seen[2].adapter is None


async def _follow(updates: Any, other: Client) -> list[Any]:
    seen = []
    async for update in updates:
        seen += update.events
        if update.caught_up:
            await asyncio.to_thread(lambda: list(other.adapters.import_many([entry("new")])))
            await asyncio.to_thread(other.adapters.delete, "before")
        if len(seen) == 3:
            assert update.resume_token
            return seen
    raise AssertionError("the watch ended")


async def _async(updates: Iterator[Any]) -> Any:
    while (update := await asyncio.to_thread(next, updates, None)) is not None:
        yield update


def test_a_watch_that_cannot_go_on_has_its_class(ask: Driver) -> None:
    with pytest.raises(WatchExpired):
        ask(lambda client: client.adapters.watch(resume_token="0123456789abcdef-0"))
    with pytest.raises(InvalidRequest) as caught:
        ask(lambda client: client.adapters.watch(resume_token="x"))
    assert caught.value.field == "resume_token"


def test_versions_and_deletion(ask: Driver, plane: ControlPlane) -> None:
    first, second = (
        ask(lambda client, w=weights: client.adapters.import_many([entry("a", w)]))[0].digest
        for weights in (b"1", b"2")
    )
    back = ask(lambda client: client.adapters.activate("a"))
    assert (back.digest, back.versions) == (first, [second, first])
    assert ask(lambda client: client.adapters.activate("a", second[:12], etag=back.etag)).digest == second
    with pytest.raises(AdapterNotFound):
        ask(lambda client: client.adapters.activate("a", "0" * 12))
    plane.store.leases[second] = 2
    assert ask(lambda client: client.adapters.delete("a")) == Deletion(0, 1, 2)


def test_lists_are_filtered(ask: Driver) -> None:
    ask(
        lambda client: client.adapters.import_many(
            [entry("a", b"123", tenant="anna"), entry("b"), entry("c", tenant="anna")]
        )
    )
    found = ask(lambda client: client.adapters.list(1, filter='tenant = "anna"', order_by="size_bytes"))
    assert [(each.id, each.tenant) for each in found] == [("c", "anna"), ("a", "anna")]


def test_statistics(ask: Driver, plane: ControlPlane) -> None:
    ask(lambda client: client.adapters.import_many([entry("a"), entry("b")]))
    table = plane.backend.statistics
    for name, seconds in (("a", 0.1), ("b", 0.4), ("a", 0.1)):
        measured = Measured(0.0, 5)
        measured.tokens(3, seconds)
        table.end(table.begin(name), measured, "stop")
    found = ask(lambda client: client.adapters.statistics("a"))
    assert (found.id, found.request_count, found.prompt_token_count, found.generated_token_count) == ("a", 2, 10, 6)
    assert found.outcome_counts["stop"] == 2
    assert found.time_to_first_token.count == 2
    assert found.time_to_first_token.p50 == pytest.approx(0.1, rel=0.08)
    assert found.first_use_time is not None
    assert ask(lambda client: client.adapters.top(1)).statistics == [found]
    top = ask(lambda client: client.adapters.top(order_by="time_to_first_token.p99 desc"))
    assert ([each.id for each in top.statistics], top.tracked_count, top.folded_count) == (["b", "a"], 2, 0)
    assert (top.other.id, top.other.request_count, top.other.first_use_time) == ("", 0, None)


def test_export(ask: Driver) -> None:
    (made,) = ask(lambda client: client.adapters.import_many([entry("a")]))
    assert b"".join(ask(lambda client: client.adapters.export(["a"]))) == made.digest.encode() * 4096 * 3
    with pytest.raises(AdapterNotFound):
        ask(lambda client: client.adapters.export(["gone"]))


def test_the_store(ask: Driver, plane: ControlPlane) -> None:
    assert ask(lambda client: client.store.statistics()).store_id == "s-1"
    plane.store.problems = [Problem("bad_digest", "d" * 64, 3, "it is damaged")]
    told: list[tuple[int, int]] = []
    done = ask(lambda client: client.store.compact(lambda *each: told.append(each)))
    assert (done.pack_count, done.freed_bytes, done.check.problem_count) == (2, 1000, 1)
    assert told[-1] == (3, 3)
    assert ask(lambda client: client.store.check()).problem_count == 0
    (problem,) = ask(lambda client: client.store.check(deep=True)).problems
    assert (problem.kind, problem.pack, problem.message) == ("bad_digest", 3, "it is damaged")


def test_entries_that_take_long_keep_the_import_alive(
    ask: Driver, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an interrupted import do while what was sent is skipped, at the beginning and in the middle."""
    monkeypatch.setattr(imports, "SILENCE_S", 0.5)
    monkeypatch.setattr(_imports, "SIGN_S", 0.1)
    monkeypatch.setattr(_batches, "MAX_ENTRIES", 2)

    def slow() -> Iterator[ImportEntry]:
        for i in range(7):
            if i in (0, 4):
                time.sleep(1.0)
            yield entry(f"a{i}")

    results = ask(lambda client: client.adapters.import_many(slow()))
    assert [(result.id, result.outcome) for result in results] == [(f"a{i}", "created") for i in range(7)]
    assert [len(batch) for batch in plane.store.batches] == [2, 2, 2, 1]


def test_only_calls_that_may_be_repeated_are_retried() -> None:
    methods = {
        (name["service"], name.get("method")): "retryPolicy" in config
        for config in _service_config()["methodConfig"]
        for name in config["name"]
    }
    once = {method for (_, method), retried in methods.items() if not retried}
    changing = {"UploadAdapter", "ImportAdapters", "LoadAdapter", "ActivateAdapterVersion", "DeleteAdapter"}
    assert once == {*changing, "BackupStore"}
    assert changing <= {each.name for each in adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods}
    assert methods[ADAPTERS, None]
