"""The control plane's other calls over a socket: options, versions, deletion, statistics, export, upkeep, the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from overtone.adapters.operations import Problem
from overtone.api import exports, interceptor
from overtone.api.usage import Measured
from overtone.v1 import adapters_pb2 as pb
from overtone.v1 import adapters_pb2_grpc as pb_grpc
from overtone.v1 import store_pb2, store_pb2_grpc
from support.control_plane import ControlPlane


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path) as plane:
        yield plane


@pytest.fixture
def adapters(plane: ControlPlane) -> Iterator[pb_grpc.AdapterServiceStub]:
    with plane.channel() as channel:
        yield pb_grpc.AdapterServiceStub(channel)


@pytest.fixture
def store(plane: ControlPlane) -> Iterator[store_pb2_grpc.StoreServiceStub]:
    with plane.channel() as channel:
        yield store_pb2_grpc.StoreServiceStub(channel)


def upload(stub: Any, adapter_id: str, weights: bytes = b"1", **options: Any) -> pb.Adapter:
    header = pb.UploadHeader(adapter_id=adapter_id, options=pb.AdapterOptions(**options))
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    chunks = [pb.UploadAdapterRequest(chunk=pb.FileChunk(file_name=name, data=data)) for name, data in files.items()]
    return stub.UploadAdapter(iter([pb.UploadAdapterRequest(header=header), *chunks]))


def refused(call: Any, *arguments: Any) -> tuple[str, str]:
    code, details = outcome(call, *arguments)
    assert code != "OK"
    return code, details


def outcome(call: Any, *arguments: Any) -> tuple[str, str]:
    """The code and the message with which a call ends, streams read to their end."""
    try:
        answer = call(*arguments)
        if isinstance(answer, grpc.Call):
            list(answer)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def test_an_adapter_shows_whose_it_is(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    made = upload(adapters, "a", tenant="anna", labels={"k": "v"})
    assert (made.tenant, made.base_fingerprint, made.HasField("last_used_time")) == ("anna", "f" * 64, False)
    assert upload(adapters, "a", b"2").tenant == "anna"  # left as it is
    assert upload(adapters, "a", b"2", tenant="").tenant == ""
    with pytest.raises(grpc.RpcError, match="tenant must be"):
        upload(adapters, "a", tenant="Not One")


def test_lists_are_filtered_and_ordered(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    for i, tenant in enumerate(("anna", "bert", "anna")):
        upload(adapters, f"a{i}", b"1" * (3 - i), tenant=tenant)

    def names(**request: Any) -> list[str]:
        return [each.name[9:] for each in adapters.ListAdapters(pb.ListAdaptersRequest(**request)).adapters]

    assert names() == ["a0", "a1", "a2"]
    assert names(filter='tenant = "anna"', order_by="size_bytes") == ["a2", "a0"]
    assert names(filter='tenant = "anna"', order_by="size_bytes desc", page_size=1) == ["a0"]
    with pytest.raises(grpc.RpcError, match="cannot read"):
        names(filter="tenant ~ 1")


def test_versions_are_activated(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    first, second = (upload(adapters, "a", content) for content in (b"1", b"2"))
    back = adapters.ActivateAdapterVersion(pb.ActivateAdapterVersionRequest(name="adapters/a", etag=second.etag))
    assert (back.digest, set(back.versions)) == (first.digest, {first.digest, second.digest})
    request = pb.ActivateAdapterVersionRequest(name="adapters/a", version=second.digest[:12])
    assert adapters.ActivateAdapterVersion(request).digest == second.digest
    request.etag = first.etag
    assert refused(adapters.ActivateAdapterVersion, request)[0] == "ABORTED"
    request = pb.ActivateAdapterVersionRequest(name="adapters/a", version="0" * 12)
    assert refused(adapters.ActivateAdapterVersion, request)[0] == "NOT_FOUND"
    assert refused(adapters.ActivateAdapterVersion, pb.ActivateAdapterVersionRequest(name="a"))[0] == "INVALID_ARGUMENT"


def test_a_deletion_says_what_it_frees(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    upload(adapters, "free", b"1" * 10)
    held = upload(adapters, "held", b"2" * 20)
    plane.store.leases[held.digest] = 3
    freed = adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/free"))
    assert (freed.freed_bytes, freed.pending_bytes, freed.lease_count) == (10, 0, 0)
    pending = adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/held"))
    assert (pending.freed_bytes, pending.pending_bytes, pending.lease_count) == (0, 20, 3)
    assert refused(adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/held"))[0] == "NOT_FOUND"


def use(plane: ControlPlane, adapter_id: str, *seconds: float, outcome: str = "eos") -> None:
    measured, now = Measured(0.0, 7), 0.0
    for each in seconds:
        now += each
        measured.tokens(1, now)
    measured.ended(now)
    plane.backend.statistics.end(plane.backend.statistics.begin(adapter_id), measured, outcome)


def test_statistics_of_one(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    upload(adapters, "used")
    upload(adapters, "unused")
    use(plane, "used", 0.5, 0.02, 0.02)
    use(plane, "used", 2.0, outcome="error")
    found = adapters.GetAdapterStatistics(pb.GetAdapterStatisticsRequest(name="adapters/used/statistics"))
    assert (found.name, found.request_count, found.error_count) == ("adapters/used/statistics", 2, 1)
    assert {name: count for name, count in found.outcome_counts.items() if count} == {"eos": 1, "error": 1}
    assert (found.prompt_token_count, found.generated_token_count) == (14, 4)
    assert (found.time_to_first_token.count, found.inter_token.count, found.total.count) == (2, 2, 2)
    assert found.time_to_first_token.p50.ToNanoseconds() == pytest.approx(0.5e9, rel=0.08)
    assert found.time_to_first_token.p99.ToNanoseconds() == pytest.approx(2e9, rel=0.08)
    assert found.last_use_time.ToNanoseconds() >= found.first_use_time.ToNanoseconds() > 0
    none = adapters.GetAdapterStatistics(pb.GetAdapterStatisticsRequest(name="adapters/unused/statistics"))
    assert (none.name, none.request_count) == ("adapters/unused/statistics", 0)
    assert not none.HasField("first_use_time")
    for name, code in (("adapters/gone/statistics", "NOT_FOUND"), ("adapters/used", "INVALID_ARGUMENT")):
        assert refused(adapters.GetAdapterStatistics, pb.GetAdapterStatisticsRequest(name=name))[0] == code


def test_statistics_of_all(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    for i in range(5):
        upload(adapters, f"a{i}")
        for _ in range(i + 1):
            use(plane, f"a{i}", 1.0 / (i + 1))

    def page(**request: Any) -> tuple[list[str], pb.ListAdapterStatisticsResponse]:
        found = adapters.ListAdapterStatistics(pb.ListAdapterStatisticsRequest(**request))
        return [each.name.split("/")[1] for each in found.statistics], found

    names, first = page(page_size=3)
    assert names == ["a4", "a3", "a2"]
    names, last = page(page_size=3, page_token=first.next_page_token)
    assert (names, last.next_page_token) == (["a1", "a0"], "")
    assert page(order_by="time_to_first_token.p99 desc", page_size=2)[0] == ["a0", "a1"]
    assert page(order_by="request_count asc", page_size=1)[0] == ["a0"]
    adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/a4"))
    names, found = page()
    assert names == ["a3", "a2", "a1", "a0"]
    assert (found.tracked_count, found.folded_count, found.other.request_count, found.other.name) == (4, 0, 5, "")
    for request in ({"order_by": "nothing"}, {"page_size": -1}, {"page_token": "x"}, {"order_by": "requests; drop"}):
        message = pb.ListAdapterStatisticsRequest(**request)
        assert refused(adapters.ListAdapterStatistics, message)[0] == "INVALID_ARGUMENT"


def test_an_export_is_streamed(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    plane.store.work = 8
    digests = [upload(adapters, name, name.encode()).digest for name in ("a", "b")]
    request = pb.ExportAdaptersRequest(names=["adapters/a", "adapters/b"])
    pieces = [each.data for each in adapters.ExportAdapters(request)]
    assert b"".join(pieces) == b"".join(digest.encode() * 4096 * 8 for digest in digests)
    assert len(pieces) > 4
    assert all(pieces)
    request.names.append("adapters/gone")
    assert refused(adapters.ExportAdapters, request)[0] == "NOT_FOUND"
    assert refused(adapters.ExportAdapters, pb.ExportAdaptersRequest())[0] == "INVALID_ARGUMENT"


def test_an_export_that_nobody_reads_ends(plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub) -> None:
    plane.store.work = 10_000
    upload(adapters, "a")
    for _ in range(3):
        call = adapters.ExportAdapters(pb.ExportAdaptersRequest(names=["adapters/a"]))
        assert next(call).data
        call.cancel()
    plane.call(plane.calls.wait_idle(60))
    plane.store.work = 1
    assert list(adapters.ExportAdapters(pb.ExportAdaptersRequest(names=["adapters/a"])))


def test_the_stores_statistics(store: store_pb2_grpc.StoreServiceStub) -> None:
    found = store.GetStoreStatistics(store_pb2.GetStoreStatisticsRequest())
    assert (found.store_id, found.adapter_count, found.hit_total, found.miss_total, found.disk_bytes) == (
        "s-1", 0, 7, 9, 10,
    )  # fmt: skip


def test_compaction_tells_how_far_it_is(plane: ControlPlane, store: store_pb2_grpc.StoreServiceStub) -> None:
    plane.store.problems = [Problem("bad_digest", "d" * 64, 3, "it is damaged")]
    *steps, last = store.CompactStore(store_pb2.CompactStoreRequest())
    assert [(each.progress.done, each.progress.total) for each in steps[-1:]] == [(3, 3)]
    assert (last.compaction.pack_count, last.compaction.moved_bytes, last.compaction.freed_bytes) == (2, 300, 1000)
    assert last.compaction.check.problems[0].message == "it is damaged"


def test_a_check_lists_its_problems(plane: ControlPlane, store: store_pb2_grpc.StoreServiceStub) -> None:
    plane.store.problems = [Problem("bad_digest", "d" * 64, 3, "it is damaged")] * 10_001
    *_, last = store.CheckStore(store_pb2.CheckStoreRequest(deep=True))
    assert (last.check.problem_count, len(last.check.problems)) == (10_001, 10_000)
    problem = last.check.problems[0]
    assert (problem.kind, problem.digest, problem.pack) == ("bad_digest", "d" * 64, 3)
    *_, last = store.CheckStore(store_pb2.CheckStoreRequest())
    assert last.check.problem_count == 0


def test_upkeep_is_done_once_at_a_time_and_ends_with_its_client(
    plane: ControlPlane, store: store_pb2_grpc.StoreServiceStub
) -> None:
    plane.store.work = 1 << 30
    call = store.CompactStore(store_pb2.CompactStoreRequest())
    assert next(call).progress.done
    assert refused(store.CompactStore, store_pb2.CompactStoreRequest())[0] == "RESOURCE_EXHAUSTED"
    call.cancel()
    assert plane.store.stopped.wait(60)
    plane.store.work = 1
    while (code := outcome(store.CompactStore, store_pb2.CompactStoreRequest())[0]) != "OK":
        assert code == "RESOURCE_EXHAUSTED"
        time.sleep(0.01)


def test_a_line_in_the_log_for_every_change(
    plane: ControlPlane,
    adapters: pb_grpc.AdapterServiceStub,
    store: store_pb2_grpc.StoreServiceStub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="overtone.changes"):
        upload(adapters, "a", b"12345")
        upload(adapters, "a", b"1")
        assert refused(upload, adapters, "bad", b"bad")[0] == "INVALID_ARGUMENT"
        adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter=pb.Adapter(name="adapters/a", pinned=True)))
        adapters.ActivateAdapterVersion(pb.ActivateAdapterVersionRequest(name="adapters/a"))
        list(adapters.ExportAdapters(pb.ExportAdaptersRequest(names=["adapters/a"])))
        adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/a"))
        list(store.CompactStore(store_pb2.CompactStoreRequest()))
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes"]
    told = [(line["method"], line.get("adapter"), line["code"], line.get("bytes")) for line in lines]
    assert told == [
        ("UploadAdapter", "a", "OK", 5),
        ("UploadAdapter", "a", "OK", 1),
        ("UploadAdapter", "bad", "INVALID_ARGUMENT", None),
        ("UpdateAdapter", "adapters/a", "OK", None),
        ("ActivateAdapterVersion", "adapters/a", "OK", 1),
        ("ExportAdapters", None, "OK", 3 * 64 * 4096),
        ("DeleteAdapter", "adapters/a", "OK", 1),
        ("CompactStore", None, "OK", 1000),
    ]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") and line["total_ms"] >= 0 for line in lines)
    assert lines[2]["reason"] == "ADAPTER_MALFORMED"
    assert (lines[0]["received_bytes"], len(lines[0]["digest"])) == (7, 64)


def waiting(real: Callable[..., Any]) -> tuple[Callable[..., Any], threading.Event, threading.Event]:
    """The same, once it may; whether it was called; what lets it go on."""
    begun, go = threading.Event(), threading.Event()

    def wait(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return real(*arguments, **more)

    return wait, begun, go


@pytest.mark.parametrize(
    ("method", "work"),
    [("UploadAdapter", "commit_upload"), ("DeleteAdapter", "delete"), ("UpdateAdapter", "update")],
)
def test_a_change_whose_client_left_is_told_as_it_ended(
    plane: ControlPlane,
    adapters: pb_grpc.AdapterServiceStub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    work: str,
) -> None:
    upload(adapters, "a")
    wait, begun, go = waiting(getattr(plane.store, work))
    monkeypatch.setattr(plane.store, work, wait)
    header = pb.UploadAdapterRequest(header=pb.UploadHeader(adapter_id="a"))
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"22"}
    chunks = [pb.UploadAdapterRequest(chunk=pb.FileChunk(file_name=name, data=data)) for name, data in files.items()]
    message: Any = {
        "UploadAdapter": iter([header, *chunks]),
        "DeleteAdapter": pb.DeleteAdapterRequest(name="adapters/a"),
        "UpdateAdapter": pb.UpdateAdapterRequest(adapter=pb.Adapter(name="adapters/a", pinned=True)),
    }[method]
    with caplog.at_level(logging.INFO, logger="overtone.changes"):
        call = getattr(adapters, method).future(message)
        assert begun.wait(60)
        call.cancel()
        time.sleep(0.2)
        assert not [each for each in caplog.records if each.name == "overtone.changes"]
        go.set()
        plane.call(plane.calls.wait_idle(60))
    (line,) = [record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes"]
    assert (line["method"], line["code"]) == (method, "OK")


def test_an_upload_whose_client_leaves_early_stores_nothing(
    plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    def parts() -> Iterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=pb.UploadHeader(adapter_id="a"))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            yield pb.UploadAdapterRequest(chunk=pb.FileChunk(file_name=name, data=b"{}"))
        ended.wait(60)

    with caplog.at_level(logging.INFO, logger="overtone.changes"):
        call = adapters.UploadAdapter.future(parts())
        time.sleep(0.3)
        call.cancel()
        plane.call(plane.calls.wait_idle(60))
        ended.set()
    assert not plane.store.records
    (line,) = [record.__dict__["fields"] for record in caplog.records if record.name == "overtone.changes"]
    assert line["code"] == "CANCELLED"


def test_upkeep_keeps_its_place_until_it_has_ended(plane: ControlPlane, store: store_pb2_grpc.StoreServiceStub) -> None:
    plane.store.go.clear()
    for method, request in (
        (store.CompactStore, store_pb2.CompactStoreRequest()),
        (store.CheckStore, store_pb2.CheckStoreRequest()),
    ):
        call = method(request)
        time.sleep(0.2)
        call.cancel()
        time.sleep(0.2)
        assert refused(method, request)[0] == "RESOURCE_EXHAUSTED"
    plane.store.go.set()
    plane.call(plane.calls.wait_idle(60))
    assert outcome(store.CompactStore, store_pb2.CompactStoreRequest())[0] == "OK"


def test_a_client_that_does_not_read_loses_its_place(
    plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "STALL_S", 0.3)
    plane.store.work = 400
    upload(adapters, "a")
    request = pb.ExportAdaptersRequest(names=["adapters/a"])
    calls = [adapters.ExportAdapters(request) for _ in range(exports.MAX_EXPORTS)]
    firsts = [next(call) for call in calls]
    assert all(first.data for first in firsts)
    plane.call(plane.calls.wait_idle(60))
    assert plane.calls._in_flight == 0
    plane.store.work = 1
    assert list(adapters.ExportAdapters(request))
    for call in calls:
        with pytest.raises(grpc.RpcError):
            list(call)


def test_a_server_that_is_about_to_end_begins_no_work(
    plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub, store: store_pb2_grpc.StoreServiceStub
) -> None:
    upload(adapters, "a")
    plane.slot.drain()
    name = "adapters/a"
    for method, request in (
        (adapters.UploadAdapter, iter([])),
        (adapters.LoadAdapter, pb.LoadAdapterRequest(adapter_id="b", path="b")),
        (adapters.UpdateAdapter, pb.UpdateAdapterRequest(adapter=pb.Adapter(name=name))),
        (adapters.ActivateAdapterVersion, pb.ActivateAdapterVersionRequest(name=name)),
        (adapters.DeleteAdapter, pb.DeleteAdapterRequest(name=name)),
        (adapters.ImportAdapters, iter([])),
        (adapters.ExportAdapters, pb.ExportAdaptersRequest(names=[name])),
        (adapters.WatchAdapters, pb.WatchAdaptersRequest()),
        (store.CompactStore, store_pb2.CompactStoreRequest()),
        (store.CheckStore, store_pb2.CheckStoreRequest()),
    ):
        assert refused(method, request) == ("UNAVAILABLE", "the server is shutting down")
    assert adapters.GetAdapter(pb.GetAdapterRequest(name=name)).name == name
    assert adapters.ListAdapters(pb.ListAdaptersRequest()).adapters
    assert store.GetStoreStatistics(store_pb2.GetStoreStatisticsRequest()).adapter_count == 1


def test_messages_are_not_made_on_the_event_loop(
    plane: ControlPlane, adapters: pb_grpc.AdapterServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand of them take tens of milliseconds, in which no token would go out."""
    upload(adapters, "a")
    threads = []

    def state(digest: str) -> str:
        threads.append(threading.current_thread())
        return "stored"

    monkeypatch.setattr(plane.store, "residency_state", state)
    assert adapters.ListAdapters(pb.ListAdaptersRequest()).adapters
    watch = adapters.WatchAdapters(pb.WatchAdaptersRequest(snapshot=True))
    assert next(watch).events
    watch.cancel()
    assert len(threads) == 2
    assert plane.thread not in threads
