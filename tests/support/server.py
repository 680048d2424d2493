"""A server in a thread of the test's own process, on a real loopback socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

from overtone.api.config import ServerConfig
from overtone.api.server import Server
from overtone.client import Client
from overtone.models.base import BaseModel

T = TypeVar("T")


class ThreadServer:
    """Runs `Server` with an event loop of its own. A context manager; `settings` are fields of ServerConfig."""

    def __init__(self, store: Path, base: BaseModel | None, **settings: Any) -> None:
        ports = {"port": 0, "metrics_port": 0, "kv_cache_mib": 64, "default_max_new_tokens": 16}
        self.config = ServerConfig(store=store, **{**ports, **settings})
        self.base = base
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="test-server", daemon=True)
        self._thread.start()
        self.server: Server = self.call(self._make())

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    async def _make(self) -> Server:
        server = Server(self.config)
        await server.start()
        return server

    def call(self, work: Coroutine[Any, Any, T], timeout: float = 300.0) -> T:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def load(self) -> None:
        self.call(self.server.load(self.base))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/metrics"

    def client(self) -> Client:
        return Client(self.address)

    def stop(self, grace_s: float = 5.0) -> None:
        if self._thread.is_alive():
            self.call(self.server.stop(grace_s))
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def __enter__(self) -> Self:
        try:
            self.load()
        except BaseException:
            self.stop(0)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
