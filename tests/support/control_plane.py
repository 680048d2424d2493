"""The control plane alone on a loopback socket: real services and interceptor, a store in memory, no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from overtone.adapters.operations import Event
from overtone.api.adapter_service import AdapterService
from overtone.api.backend import BackendSlot
from overtone.api.change_log import ChangeLog
from overtone.api.changes import Changes
from overtone.api.interceptor import StatusInterceptor
from overtone.api.metrics import Metrics
from overtone.api.statistics import AdapterStatistics
from overtone.api.store_service import StoreService
from overtone.api.watch import Watches
from overtone.client import Client
from overtone.v1 import adapters_pb2_grpc, store_pb2_grpc
from support.fake_store import FakeStore

T = TypeVar("T")


class FakeBackend:
    """What the services of the control plane ask of `Backend`."""

    def __init__(self, store: FakeStore, loop: asyncio.AbstractEventLoop, ring: int) -> None:
        self.store, self.statistics, self.changes = store, AdapterStatistics(100, 5), Changes(loop, ring)
        self._threads = ThreadPoolExecutor(8)
        store.subscribe(self._changed)

    def _changed(self, event: Event) -> None:
        self.changes.publish(event)
        if event.kind == "deleted":
            self.statistics.forget(event.adapter_id)

    async def in_store(self, work: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, work))

    in_import = in_upkeep = in_watch = in_store


class ControlPlane:
    """A context manager. ring: changes that are kept for watches."""

    def __init__(self, tmp: Path, *, ring: int = 1000, heartbeat_s: float = 15.0) -> None:
        self.store = FakeStore(tmp)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run_loop, daemon=True)
        self.thread.start()
        self.calls = self.call(self._start(ring, heartbeat_s))

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    async def _start(self, ring: int, heartbeat_s: float) -> StatusInterceptor:
        self.backend = FakeBackend(self.store, self.loop, ring)
        self.slot = slot = BackendSlot()
        slot.set(self.backend)  # type: ignore[arg-type]
        calls = StatusInterceptor(Metrics())
        self._server = grpc.aio.server(interceptors=[calls])
        log = ChangeLog()
        self.watches = Watches(heartbeat_s)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(slot, log, self.watches), self._server)
        self.upkeep = StoreService(slot, log)
        store_pb2_grpc.add_StoreServiceServicer_to_server(self.upkeep, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return calls

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def client(self) -> Client:
        return Client(self.address)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.go.set()
        self.call(self._server.stop(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
