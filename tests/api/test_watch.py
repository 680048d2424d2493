"""Watching adapters over a socket: order, snapshots, resumption, slow watchers, the server's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.adapters.files import AdapterFiles
from overtone.adapters.operations import Event, ImportItem
from overtone.api.changes import MAX_CHANGES, Changes
from overtone.errors import Draining, InvalidRequest, WatchExpired
from overtone.v1 import adapters_pb2 as pb
from overtone.v1 import adapters_pb2_grpc as pb_grpc
from support.control_plane import ControlPlane


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path, ring=50, heartbeat_s=0.05) as plane:
        yield plane


def put(plane: ControlPlane, adapter_id: str, content: bytes = b"1") -> None:
    plane.store.import_many([ImportItem(adapter_id, AdapterFiles(b"{}", content))])


class Watcher:
    """A watch in the test's thread. Skips heartbeats."""

    def __init__(self, plane: ControlPlane, **request: Any) -> None:
        self._channel = plane.channel()
        self.call = pb_grpc.AdapterServiceStub(self._channel).WatchAdapters(pb.WatchAdaptersRequest(**request))
        self.token = ""
        self.seen: list[tuple[str, str]] = []

    def until(self, enough: Callable[[pb.WatchAdaptersResponse], bool]) -> pb.WatchAdaptersResponse:
        for response in self.call:
            self.token = response.resume_token
            for event in response.events:
                self.seen.append((pb.AdapterEvent.Kind.Name(event.kind)[5:].lower(), event.adapter.name[9:]))
            if enough(response):
                return response
        raise AssertionError("the watch ended")

    def live(self) -> None:
        self.until(lambda response: response.caught_up)

    def events(self, count: int) -> list[tuple[str, str]]:
        """Until so many have come in all."""
        while len(self.seen) < count:
            self.until(lambda response: bool(response.events))
        return self.seen

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.call.cancel()
        self._channel.close()


def test_changes_come_in_their_order_with_the_adapter(plane: ControlPlane) -> None:
    put(plane, "before")
    with Watcher(plane) as watcher:
        watcher.live()
        assert watcher.seen == []
        put(plane, "a")
        put(plane, "a")  # equal content is no change
        put(plane, "a", b"2")
        plane.store.update("a", pinned=True)
        response = watcher.until(lambda response: response.events[-1:] != [] and response.events[-1].adapter.pinned)
        assert response.events[-1].adapter.digest == plane.store.get("a").digest
        plane.store.delete("a")
        assert watcher.events(4) == [("created", "a"), ("updated", "a"), ("updated", "a"), ("deleted", "a")]


def test_a_heartbeat_says_that_the_watch_is_alive(plane: ControlPlane) -> None:
    with Watcher(plane) as watcher:
        watcher.live()
        first = watcher.token
        response = next(iter(watcher.call))
        assert (list(response.events), response.caught_up, response.resume_token) == ([], False, first)


def test_what_came_and_went_between_two_messages_is_only_a_deletion(tmp_path: Path) -> None:
    with ControlPlane(tmp_path) as plane, Watcher(plane) as watcher:
        watcher.live()
        token = watcher.token
        put(plane, "brief")
        plane.store.delete("brief")
        put(plane, "stays")
        with Watcher(plane, resume_token=token) as other:
            other.live()
            assert other.seen == [("deleted", "brief"), ("created", "stays")]


def test_resuming_misses_nothing_and_repeats_nothing(plane: ControlPlane) -> None:
    with Watcher(plane) as watcher:
        watcher.live()
        put(plane, "a")
        watcher.events(1)
        token = watcher.token
    put(plane, "b")
    put(plane, "c")
    with Watcher(plane, resume_token=token) as again:
        again.live()
        put(plane, "d")
        assert again.events(3) == [("created", "b"), ("created", "c"), ("created", "d")]


def first_page_only(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set."""
    go, real = threading.Event(), plane.store.list

    def gated(size: int, token: str = "") -> Any:
        assert not token or go.wait(60)
        return real(size, token)

    monkeypatch.setattr(plane.store, "list", gated)
    return go


def test_a_snapshot_then_what_follows(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(430):
        plane.store._import(ImportItem(f"a{i:03}", AdapterFiles(b"{}", b"1")))
    go = first_page_only(plane, monkeypatch)
    with Watcher(plane, snapshot=True) as watcher:
        first = next(iter(watcher.call))
        assert (len(first.events), first.resume_token, first.caught_up) == (200, "", False)
        put(plane, "late")
        go.set()
        watcher.live()
        existing = [name for kind, name in watcher.seen if kind == "existing"]
        assert [name for name in existing if name != "late"] == [f"a{i:03}" for i in range(200, 430)]
        assert watcher.seen[-1] == ("created", "late")
        put(plane, "later")
        watcher.until(lambda response: any(event.adapter.name == "adapters/later" for event in response.events))


def status(watcher: Watcher) -> tuple[str, str]:
    """The code and the reason with which it ends."""
    with pytest.raises(grpc.RpcError) as caught:
        watcher.until(lambda response: False)
    trailing = dict(caught.value.trailing_metadata())
    return caught.value.code().name, trailing["grpc-status-details-bin"].decode("latin1")


def test_a_watcher_that_is_too_slow_is_told_to_list_again(plane: ControlPlane) -> None:
    with Watcher(plane) as watcher:
        watcher.live()
        token = watcher.token
    for i in range(51):
        put(plane, f"a{i}")
    with Watcher(plane, resume_token=token) as late:
        code, details = status(late)
    assert code == "OUT_OF_RANGE"
    assert "WATCH_EXPIRED" in details


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        ({"resume_token": "nonsense"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"resume_token": "0123456789abcdef-0"}, "OUT_OF_RANGE", "WATCH_EXPIRED"),
    ],
)
def test_tokens_that_are_none_of_ours(plane: ControlPlane, request_: Any, code: str, reason: str) -> None:
    with Watcher(plane, **request_) as watcher:
        found, details = status(watcher)
    assert found == code
    assert reason in details


def test_a_snapshot_and_a_token_exclude_each_other(plane: ControlPlane) -> None:
    token = plane.backend.changes.token(0)
    with Watcher(plane, resume_token=token, snapshot=True) as watcher:
        assert status(watcher)[0] == "INVALID_ARGUMENT"


def test_the_servers_end_ends_the_watch(plane: ControlPlane) -> None:
    with Watcher(plane) as watcher:
        watcher.live()
        plane.loop.call_soon_threadsafe(plane.backend.changes.close)
        code, details = status(watcher)
    assert code == "UNAVAILABLE"
    assert "DRAINING" in details


def test_a_watcher_that_leaves_gives_its_place_back(plane: ControlPlane) -> None:
    with Watcher(plane) as watcher:
        watcher.live()
        assert plane.watches._count == 1
    plane.call(plane.calls.wait_idle(60))
    assert plane.watches._count == 0


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 30))
def test_a_reader_gets_every_change_or_is_told(bursts: list[int], capacity: int) -> None:
    """Whatever the ring holds: a reader that reads now and then sees all changes in order, or an error."""

    async def run() -> None:
        changes = Changes(asyncio.get_running_loop(), capacity)
        position, sent = changes.position, 0
        for burst in bursts:
            for _ in range(burst):
                changes.publish(Event(sent + 1, "updated", None, f"a{sent}"))
                sent += 1
            if burst > capacity:
                with pytest.raises(WatchExpired):
                    changes.since(position)
                position = changes.position
            while found := changes.since(position):
                assert [change.adapter_id for change in found] == [f"a{position + i}" for i in range(len(found))]
                assert len(found) <= MAX_CHANGES
                position += len(found)
            assert position == changes.position_of(changes.token(position)) == sent

    asyncio.run(run())


def test_waiting_for_changes() -> None:
    async def run() -> None:
        changes = Changes(asyncio.get_running_loop(), 10)
        assert await changes.after(0, 0.01) == []
        waiting = [asyncio.ensure_future(changes.after(0, 60)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(changes.publish, Event(1, "created", None, "a"))
        assert [[each.adapter_id for each in await task] for task in waiting] == [["a"]] * 3
        last = asyncio.ensure_future(changes.after(1, 60))
        await asyncio.sleep(0)
        changes.close()
        with pytest.raises(Draining):
            await last
        with pytest.raises(Draining):
            await changes.after(1, 60)
        with pytest.raises(InvalidRequest):
            changes.position_of("x")
        with pytest.raises(WatchExpired):
            changes.since(2)

    asyncio.run(run())


def test_the_servers_end_ends_a_snapshot(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(430):
        plane.store._import(ImportItem(f"a{i:03}", AdapterFiles(b"{}", b"1")))
    go = first_page_only(plane, monkeypatch)
    with Watcher(plane, snapshot=True) as watcher:
        assert next(iter(watcher.call)).events
        plane.loop.call_soon_threadsafe(plane.backend.changes.close)
        go.set()
        code, details = status(watcher)
    assert code == "UNAVAILABLE"
    assert len(watcher.seen) <= 200  # of 230: one page may have been under way
    assert "DRAINING" in details
