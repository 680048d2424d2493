"""Both clients against one fake server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from overtone.client import AsyncClient, Client
from support.fake_server import Driver, FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Driver]:
    async def connect() -> AsyncClient:
        return AsyncClient(server.address, metadata=[("X-Tenant", "t-1")])

    def make() -> object:
        if request.param == "asyncio":
            return connect()
        return Client(server.address, metadata=[("X-Tenant", "t-1")])

    driver = Driver(make)
    yield driver
    driver.close()
