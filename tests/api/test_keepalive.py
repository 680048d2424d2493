"""A unary call is silent while it decodes: the client's keep-alive pings meanwhile must not end the connection."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from overtone.v1 import generation_pb2, generation_pb2_grpc
from support.server import ThreadServer
from support.tiny import tiny_base


@pytest.mark.slow
def test_pings_during_a_silent_call(tmp_path: Path) -> None:
    base = tiny_base()
    forward = base.model.forward
    with ThreadServer(tmp_path / "store", base) as server:
        go_on = threading.Event()

        def held(*args: object, **kwargs: object) -> object:
            go_on.wait(45)
            return forward(*args, **kwargs)

        base.model.forward = held  # type: ignore[method-assign]
        options = [("grpc.keepalive_time_ms", 10_000), ("grpc.http2.max_pings_without_data", 0)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            stopping = generation_pb2.StoppingCriteria(max_new_tokens=1)
            reply = stub.Generate(generation_pb2.GenerateRequest(text="abc", stopping=stopping))
        assert len(reply.token_ids) == 1
        go_on.set()
