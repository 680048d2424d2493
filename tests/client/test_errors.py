"""Errors over the wire: each class of the tree comes back as itself, and what gRPC raises by itself gets a class too."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from overtone import errors
from overtone.client import AsyncClient, Client
from support.fake_server import Driver, FakeServer


def test_each_class_comes_back_as_itself(ask: Driver, server: FakeServer) -> None:
    for cls in errors.tree():
        server.fail = [cls("what is wrong", field="sampling.top_p", retry_after_s=1.5, metadata={"limit": "3"})]
        with pytest.raises(errors.OvertoneError) as caught:
            ask(lambda client: client.generate("Say"))
        found = caught.value
        assert type(found) is cls
        assert (found.message, found.field, found.retry_after_s) == ("what is wrong", "sampling.top_p", 1.5)
        assert found.metadata == {"limit": "3"}


def test_streams_and_the_control_plane_raise_them_too(ask: Driver, server: FakeServer) -> None:
    server.fail = [errors.QueueFull("full", retry_after_s=2.0), errors.AdapterNotFound("no such adapter")]
    with pytest.raises(errors.QueueFull) as caught:
        ask(lambda client: client.stream("Say"))
    assert caught.value.retry_after_s == 2.0
    assert caught.value.field is None
    with pytest.raises(errors.AdapterNotFound):
        ask(lambda client: client.adapters.get("x"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.NOT_FOUND, errors.AdapterNotFound),
        (grpc.StatusCode.PERMISSION_DENIED, errors.OvertoneError),
    ],
)
def test_a_bare_code_has_a_class(
    ask: Driver, server: FakeServer, code: grpc.StatusCode, expected: type[errors.OvertoneError]
) -> None:
    server.fail = [code]
    with pytest.raises(errors.OvertoneError) as caught:
        ask(lambda client: client.generate("Say"))
    assert type(caught.value) is expected
    assert caught.value.message == "bare"
    assert caught.value.metadata == ({} if expected.grpc_code == code.name else {"grpc_code": code.name})


def test_deadline(ask: Driver, server: FakeServer) -> None:
    server.hang = True
    for method in ("generate", "stream"):
        with pytest.raises(errors.DeadlineExceeded):
            ask(lambda client, name=method: getattr(client, name)("Say", timeout=0.3))


def test_a_message_too_large_is_not_overload(ask: Driver) -> None:
    with pytest.raises(errors.TooLarge):
        ask(lambda client: client.generate("x" * (17 << 20)))


def test_unavailable_is_retried(ask: Driver, server: FakeServer) -> None:
    server.retryable = True
    server.fail = [errors.EngineStarting("soon"), None, errors.EngineStarting("soon")]
    assert ask(lambda client: client.generate("Say")).text == "Hi"
    assert len(ask(lambda client: client.stream("Say"))) == 2
    assert len(server.requests) == 4


def test_no_server() -> None:
    async def generate() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            assert not await client.health()
            await client.generate("Say")

    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable):
        client.generate("Say")
    with pytest.raises(errors.Unavailable):
        asyncio.run(generate())
