"""Bulk import over a socket: what becomes of each adapter, what is refused as a whole, and what the server holds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from overtone.api import imports
from overtone.v1 import adapters_pb2 as pb
from overtone.v1 import adapters_pb2_grpc as pb_grpc
from support.control_plane import ControlPlane


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path) as plane:
        yield plane


def item(adapter_id: str, weights: bytes = b"1", **more: Any) -> pb.ImportItem:
    files = more.pop("files", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights})
    return pb.ImportItem(adapter_id=adapter_id, files=files, **more)


def run(plane: ControlPlane, *batches: list[pb.ImportItem]) -> list[list[pb.ImportResult]]:
    with plane.channel() as channel:
        requests = (pb.ImportAdaptersRequest(adapters=batch) for batch in batches)
        return [list(response.results) for response in pb_grpc.AdapterServiceStub(channel).ImportAdapters(requests)]


def outcomes(results: list[pb.ImportResult]) -> list[tuple[str, str]]:
    return [(r.adapter_id, pb.ImportResult.Outcome.Name(r.outcome)[8:].lower()) for r in results]


def reason(result: pb.ImportResult) -> tuple[str, str]:
    info = error_details_pb2.ErrorInfo()
    assert result.error.details[0].Unpack(info)
    return info.reason, info.metadata["field"]


def test_each_batch_is_answered_in_its_order(plane: ControlPlane) -> None:
    first, second, third = run(
        plane,
        [item("a"), item("b", labels={"k": "v"}, tenant="anna"), item("c")],
        [item("a"), item("b", b"2"), item("c", labels={"k": "v"})],
        [],
    )
    assert outcomes(first) == [("a", "created"), ("b", "created"), ("c", "created")]
    assert outcomes(second) == [("a", "unchanged"), ("b", "updated"), ("c", "updated")]
    assert third == []
    record = plane.store.get("b")
    assert (record.labels, record.tenant) == ({"k": "v"}, "anna")
    assert second[1].digest == record.digest


def test_a_refused_adapter_says_why_and_stops_nobody(plane: ControlPlane) -> None:
    bad = [
        (item("bad", b"bad"), ("ADAPTER_MALFORMED", "spectrum")),
        (item("../up"), ("INVALID_REQUEST", "adapter_id")),
        (item("lone", files={"adapter_config.json": b"{}"}), ("ADAPTER_MALFORMED", "adapter_model.safetensors")),
        (item("pickle", files={"adapter_model.bin": b"x"}), ("ADAPTER_MALFORMED", "adapter_model.bin")),
        (item("tenant", tenant="Not One"), ("INVALID_REQUEST", "tenant")),
        (item("labels", labels={"": "x"}), ("INVALID_REQUEST", "labels")),
        (item("good", b"2"), ("INVALID_REQUEST", "adapter_id")),
    ]
    (results,) = run(plane, [item("good"), *(each for each, _ in bad)])
    assert outcomes(results)[0] == ("good", "created")
    assert [outcome for _, outcome in outcomes(results)[1:]] == ["refused"] * len(bad)
    assert [reason(result) for result in results[1:]] == [expected for _, expected in bad]
    assert all(not result.digest for result in results[1:])
    assert plane.store.records.keys() == {"good"}


@pytest.mark.parametrize(
    ("batch", "code"),
    [
        ([item(f"a{i}") for i in range(1001)], "INVALID_ARGUMENT"),
        ([item("large", b"1" * (8 << 20))], "RESOURCE_EXHAUSTED"),
        ([item("broken", b"broken")], "UNAVAILABLE"),
    ],
)
def test_what_ends_the_import_leaves_the_batches_before(
    plane: ControlPlane, batch: list[pb.ImportItem], code: str
) -> None:
    answered, first = [], threading.Event()

    def requests() -> Iterator[pb.ImportAdaptersRequest]:
        yield pb.ImportAdaptersRequest(adapters=[item("a")])
        # An answer that is still on its way when the call fails may be lost.
        assert first.wait(60)
        yield pb.ImportAdaptersRequest(adapters=batch)
        yield pb.ImportAdaptersRequest(adapters=[item("z")])

    with plane.channel() as channel:
        call = pb_grpc.AdapterServiceStub(channel).ImportAdapters(requests())
        answered.append(outcomes(list(next(call).results)))
        first.set()
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code().name == code
    assert answered == [[("a", "created")]]
    assert plane.store.records.keys() == {"a"}


def test_a_client_that_sends_without_end_is_held_back(plane: ControlPlane) -> None:
    """While the store is busy the server reads a few batches; what the client sends beyond waits with the client."""
    plane.store.go.clear()
    sent, batch = [0], pb.ImportAdaptersRequest(adapters=[item("a", b"1" * (1 << 20))])

    def endless() -> Iterator[pb.ImportAdaptersRequest]:
        while True:
            sent[0] += 1
            yield batch

    with plane.channel() as channel:
        call = pb_grpc.AdapterServiceStub(channel).ImportAdapters(endless())
        while not plane.store.batches:
            time.sleep(0.01)
        before = -1
        while before != sent[0]:
            before = sent[0]
            time.sleep(0.3)
        assert len(plane.store.batches) == 1
        assert sent[0] <= imports.AHEAD + 1 + 16  # HTTP/2's own buffers hold some megabytes
        plane.store.go.set()
        for _ in range(40):
            assert next(call).results
        call.cancel()
        with suppress(grpc.RpcError):
            list(call)
    plane.call(plane.calls.wait_idle(60))


def test_only_some_imports_at_once(plane: ControlPlane) -> None:
    plane.store.go.clear()
    with plane.channel() as channel:
        stub, stop = pb_grpc.AdapterServiceStub(channel), threading.Event()

        def one_then_wait() -> Iterator[pb.ImportAdaptersRequest]:
            yield pb.ImportAdaptersRequest(adapters=[item("a")])
            stop.wait(60)

        calls = [stub.ImportAdapters(one_then_wait()) for _ in range(imports.MAX_IMPORTS)]
        while len(plane.store.batches) < imports.MAX_IMPORTS:
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ImportAdapters(iter([])))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        plane.store.go.set()
        assert all(next(call).results for call in calls)
        stop.set()
        assert [list(call) for call in calls] == [[]] * len(calls)
        assert list(stub.ImportAdapters(iter([]))) == []


def test_a_silent_client_loses_its_place(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SILENCE_S", 0.05)
    ended = threading.Event()

    def silent() -> Iterator[pb.ImportAdaptersRequest]:
        ended.wait(60)
        yield from ()

    with plane.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        list(pb_grpc.AdapterServiceStub(channel).ImportAdapters(silent()))
    ended.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_line_in_the_log_for_each_batch(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="overtone.changes"):
        run(plane, [item("a"), item("b"), item("bad", b"bad")], [item("a")])
    first, second = (record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes")
    assert first["method"] == "ImportAdapters"
    assert first["peer"].startswith("ipv4:127.0.0.1")
    assert (first["code"], first["adapters"], first["created"], first["refused"]) == ("OK", 3, 2, 1)
    assert first["reasons"] == {"ADAPTER_MALFORMED": 1}
    assert first["bytes"] == 2 + 1 + 2 + 1 + 2 + 3
    assert (second["unchanged"], "created" in second) == (1, False)


def test_a_batch_under_way_keeps_its_place_and_its_line(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    """Though its client has left: what is then stored is not told to be cancelled."""
    plane.store.go.clear()
    with caplog.at_level(logging.INFO, logger="overtone.changes"), plane.channel() as channel:
        stub = pb_grpc.AdapterServiceStub(channel)
        for i in range(imports.MAX_IMPORTS):
            call = stub.ImportAdapters(iter([pb.ImportAdaptersRequest(adapters=[item(f"a{i}")])]))
            while len(plane.store.batches) <= i:
                time.sleep(0.01)
            call.cancel()
        time.sleep(0.3)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ImportAdapters(iter([])))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not [each for each in caplog.records if each.name == "overtone.changes"]
        plane.store.go.set()
        plane.call(plane.calls.wait_idle(60))
        assert list(stub.ImportAdapters(iter([]))) == []
    assert len(plane.store.records) == imports.MAX_IMPORTS
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes"]
    assert [(line["code"], line["created"]) for line in lines] == [("OK", 1)] * imports.MAX_IMPORTS


def test_a_sign_of_life_is_no_change(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="overtone.changes"):
        first, second, third = run(plane, [], [item("a")], [])
    assert (first, outcomes(second), third) == ([], [("a", "created")], [])
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes"]
    assert [line["adapters"] for line in lines] == [1]
