"""The server around the engine: health, reflection, metrics, overload, deadlines, clients that leave, drain."""

from __future__ import annotations

import logging
import threading
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from overtone.api.server import Server
from overtone.client import Client, DeadlineExceeded, Draining, EngineError, EngineStarting, QueueFull
from overtone.errors import OvertoneError
from support.adapters import make_loca_folder
from support.server import ThreadServer
from support.tiny import tiny_base
from support.traffic import Streams

SERVICES = ("overtone.v1.GenerationService", "overtone.v1.AdapterService")


def health(server: ThreadServer, service: str = "") -> int:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return check(health_pb2.HealthCheckRequest(service=service)).status


def metric(server: ThreadServer, name: str, **labels: str) -> float:
    with urllib.request.urlopen(server.metrics_url) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    samples = [
        s for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items()
    ]
    return sum(sample.value for sample in samples)


def test_not_serving_until_warm(tmp_path: Path) -> None:
    server = ThreadServer(tmp_path / "store", tiny_base())
    try:
        for service in ("", *SERVICES):
            assert health(server, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        with server.client() as client, pytest.raises(EngineStarting):
            client.generate("abc", timeout=60.0)  # the client retries a few times first
        server.load()
        for service in ("", *SERVICES):
            assert health(server, service) == health_pb2.HealthCheckResponse.SERVING
        with server.client() as client:
            assert client.generate("abc", max_new_tokens=2).token_ids
    finally:
        server.stop()


def test_reflection_lists_and_describes_the_services(tiny_server: ThreadServer) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asks = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[1]),
        ]
        listed, described = list(stub.ServerReflectionInfo(iter(asks)))
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


def test_the_control_plane_on_a_port_of_its_own(tmp_path: Path) -> None:
    """Whoever may generate need not be able to change or list adapters."""
    with ThreadServer(tmp_path / "store", tiny_base(), admin_port=0) as server:
        folder = make_loca_folder(tmp_path / "a", server.base.modules, n=10, seed=1)
        admin = f"127.0.0.1:{server.server.admin_port}"
        with server.client() as client, Client(admin) as operator:
            operator.adapters.load(folder, id="a")
            assert client.generate("abc", adapter="a", max_new_tokens=2).token_ids
            assert operator.store.statistics().adapter_count == 1
            for refused in (
                lambda: client.adapters.get("a"),
                lambda: client.adapters.delete("a"),
                client.store.statistics,
                lambda: operator.generate("abc"),
            ):
                with pytest.raises(OvertoneError, match=r"(?i)method not found"):
                    refused()
        for address, names in ((server.address, SERVICES[:1]), (admin, (SERVICES[1], "overtone.v1.StoreService"))):
            with grpc.insecure_channel(address) as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                ask = reflection_pb2.ServerReflectionRequest(list_services="")
                (listed,) = stub.ServerReflectionInfo(iter([ask]))
                found = {each.name for each in listed.list_services_response.service}
                assert {each for each in found if each.startswith("overtone")} == set(names)
                status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
                assert status == health_pb2.HealthCheckResponse.SERVING


def test_metrics_count_what_happened(tiny_server: ThreadServer, tmp_path: Path) -> None:
    folder = make_loca_folder(tmp_path / "a", tiny_server.base.modules, n=10, seed=1)
    names = (
        "prompt_tokens_total",
        "generated_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_seconds_count",
    )
    # The warm-up counts too.
    before = {name: metric(tiny_server, f"overtone_{name}") for name in names}
    unadapted = metric(tiny_server, "overtone_requests_total", outcome="length", adapted="false")
    with tiny_server.client() as client:
        for index in range(3):
            loaded = client.adapters.load(folder, id=f"secret-name-{index}")
            if not index:  # read it from the disk, though the upload has put it into memory
                assert tiny_server.server.backend.store._versions.residency.drop(loaded.digest)
            client.generate("abcdef", adapter=f"secret-name-{index}", max_new_tokens=5, ignore_eos=True)
        client.generate("abcdef", max_new_tokens=5, ignore_eos=True)
        prompt = len(client.tokenize("abcdef").token_ids)
    assert metric(tiny_server, "overtone_requests_total", outcome="length", adapted="true") == 3
    assert metric(tiny_server, "overtone_requests_total", outcome="length", adapted="false") == unadapted + 1
    after = {name: metric(tiny_server, f"overtone_{name}") - before[name] for name in names}
    assert list(after.values()) == [4 * prompt, 4 * 5, 4, 4 * 4]
    assert metric(tiny_server, "overtone_adapters_registered") == 3
    assert metric(tiny_server, "overtone_adapters_resident") == 1  # one content, three names
    assert metric(tiny_server, "overtone_adapter_load_seconds_count") >= 1
    assert metric(tiny_server, "overtone_calls_total", method="Generate", code="OK") == 4
    assert metric(tiny_server, "overtone_kv_cache_usage_ratio") == 0
    names = [f"secret-name-{index}" for index in range(3)]
    series = ("requests", "generated_tokens", "errors")

    def shown() -> list[list[float]]:
        return [[metric(tiny_server, f"overtone_adapter_{s}_total", adapter=name) for s in series] for name in names]

    assert shown() == [[0, 0, 0]] * 3  # from when they came into the top
    with tiny_server.client() as client:
        for name in names:
            client.generate("abcdef", adapter=name, max_new_tokens=5, ignore_eos=True)
    assert shown() == [[1, 5, 0]] * 3
    with tiny_server.client() as client:
        client.adapters.delete(names[0])
    assert metric(tiny_server, "overtone_adapters_tracked") == 2
    with urllib.request.urlopen(tiny_server.metrics_url) as reply:
        assert names[0].encode() not in reply.read()


def test_full_queue_is_refused_with_retry_info(tmp_path: Path) -> None:
    with ThreadServer(tmp_path / "store", tiny_base(), max_batch=1, max_step_tokens=16, max_queue=2) as server:
        streams = Streams(server.address, [None], new_tokens=200)
        streams.wait_for_more(1)
        refused: list[QueueFull] = []
        done = threading.Event()

        def ask() -> None:
            with server.client() as client:
                while not done.is_set():
                    try:
                        client.generate("abc", max_new_tokens=200, ignore_eos=True)
                    except QueueFull as error:
                        refused.append(error)
                        done.set()

        askers = [threading.Thread(target=ask) for _ in range(6)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        streams.join()
        assert refused[0].retry_after_s is not None
        assert refused[0].retry_after_s > 0
        assert streams.counts == [200]


def test_deadline_ends_a_request_and_frees_its_pages(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        long = tiny_server.server.backend.engine_config.max_context_tokens - 16
        with pytest.raises(DeadlineExceeded):
            client.generate("abc", max_new_tokens=long, ignore_eos=True, timeout=0.05)
        assert client.generate("abc", max_new_tokens=2, ignore_eos=True).finish_reason == "length"
    _wait_until_idle(tiny_server)


def test_a_client_that_leaves_frees_its_place(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        long = tiny_server.server.backend.engine_config.max_context_tokens - 16
        stream = client.stream("abc", max_new_tokens=long, ignore_eos=True)
        next(stream)
        stream.close()
        _wait_until_idle(tiny_server)
        assert metric(tiny_server, "overtone_requests_total", outcome="cancelled") == 1
        assert client.generate("abc", max_new_tokens=2).token_ids


def _wait_until_idle(server: ThreadServer) -> None:
    """The gauges change with the engine's next step."""
    for _ in range(200):
        if metric(server, "overtone_requests_running") == 0 and metric(server, "overtone_kv_cache_usage_ratio") == 0:
            return
        threading.Event().wait(0.05)
    raise AssertionError("pages are still in use")


def test_drain_lets_streams_finish_and_refuses_new_calls(tmp_path: Path) -> None:
    base = tiny_base()
    server = ThreadServer(tmp_path / "store", base)
    server.load()
    go_on, forward = threading.Event(), base.model.forward
    streams = Streams(server.address, [None, None], new_tokens=60)
    streams.wait_for_more(1)

    def held(*args: object, **kwargs: object) -> object:
        assert go_on.wait(300)
        return forward(*args, **kwargs)

    base.model.forward = held  # type: ignore[method-assign]
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopper = threading.Thread(target=server.stop, args=(300.0,))
        stopper.start()
        # The watch stays open: it hears of the drain and does not delay it.
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with server.client() as client, pytest.raises(Draining):
            client.generate("abc", timeout=60.0)
        go_on.set()
        streams.join()
        stopper.join()
    assert streams.counts == [60, 60]


async def _told(server: Server) -> None:
    """Clients hear of it a moment before the server's own loop does."""
    await server.died.wait()
    assert server._farewell is not None
    await server._farewell


def test_a_dead_engine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadServer(tmp_path / "store", tiny_base()) as server:
        streams = Streams(server.address, [None], new_tokens=400)
        streams.wait_for_more(1)

        def broken() -> None:
            raise RuntimeError("scheduler is broken")

        monkeypatch.setattr(server.server.backend.engine._scheduler, "schedule", broken)
        with pytest.raises(AssertionError, match="engine has failed"):
            streams.join()
        server.call(_told(server.server))
        with server.client() as client, pytest.raises(EngineError):
            client.generate("abc")
        for service in ("", *SERVICES):
            assert health(server, service) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_one_log_line_per_request_without_its_prompt(
    tiny_server: ThreadServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="overtone.requests"), tiny_server.client() as client:
        answer = client.generate("a very private thing", max_new_tokens=3, ignore_eos=True, request_id="r-1")
    records = [r for r in caplog.records if r.name == "overtone.requests"]
    assert len(records) == 1
    fields = records[0].__dict__["fields"]
    assert fields["request_id"] == "r-1"
    assert fields["code"] == "OK"
    assert fields["output_tokens"] == 3
    assert fields["finish_reason"] == "length"
    assert fields["prompt_tokens"] == answer.usage.prompt_tokens
    assert "private" not in str(records[0].__dict__)


def test_sampling_seed_gives_the_same_text_in_any_company(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        alone = client.generate("abc", temperature=1.0, seed=11, max_new_tokens=20, ignore_eos=True)
        streams = Streams(tiny_server.address, [None] * 3, new_tokens=100)
        streams.wait_for_more(1)
        again = client.generate("abc", temperature=1.0, seed=11, max_new_tokens=20, ignore_eos=True)
        other = client.generate("abc", temperature=1.0, seed=12, max_new_tokens=20, ignore_eos=True)
        streams.join()
    assert alone.token_ids == again.token_ids
    assert alone.seed == 11
    assert other.token_ids != alone.token_ids


def test_logprobs_prompt_echo_and_stop_strings(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        plain = client.generate("abc", max_new_tokens=12, ignore_eos=True, top_n=3, echo_prompt=True)
        assert plain.prompt is not None
        assert plain.prompt.text == "abc"
        assert len(plain.tokens) == 12
        assert all(t.rank == 1 and t.top[0].id == t.id and t.logprob == t.top[0].logprob for t in plain.tokens)
        visible = [c for c in plain.text if c.isprintable() and c != "\ufffd"]
        stop = visible[len(visible) // 2]
        cut = client.generate("abc", max_new_tokens=12, ignore_eos=True, stop=[stop])
        assert cut.finish_reason == "stop"
        assert cut.stop == stop
        assert cut.text == plain.text[: plain.text.index(stop)]
        kept = client.generate("abc", max_new_tokens=12, ignore_eos=True, stop=[stop], include_stop=True)
        assert kept.text == cut.text + stop
        pieces = list(client.stream("abc", max_new_tokens=12, ignore_eos=True, stop=[stop]))
        assert "".join(piece.text for piece in pieces) == cut.text
