"""One server: ports open at once, NOT_SERVING until the model is warm, drained on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from functools import partial
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from prometheus_client import start_http_server

from overtone.api import access_log
from overtone.api.adapter_service import AdapterService
from overtone.api.backend import Backend, BackendSlot
from overtone.api.change_log import ChangeLog
from overtone.api.config import ServerConfig
from overtone.api.drop_folder import DropFolder, watch_folder
from overtone.api.generation_service import GenerationService
from overtone.api.interceptor import StatusInterceptor
from overtone.api.listening import CONTROL, GENERATION, OPTIONS, add_common, bind
from overtone.api.metrics import Metrics
from overtone.api.store_service import StoreService
from overtone.api.threads import run_detached
from overtone.api.watch import Watches
from overtone.errors import ConfigError, EngineStarting
from overtone.models.base import BaseModel, load_base_model
from overtone.v1 import adapters_pb2_grpc, generation_pb2_grpc, store_pb2_grpc

log = logging.getLogger(__name__)

_FLUSH_S = 1.0
"""What the last answers may take to leave."""


class Server:
    """Use: `await start()`, `await load()`, then `await stop()`. Everything it owns is its own: several fit in a process."""

    def __init__(self, config: ServerConfig, threads: int = 0) -> None:
        """threads: of the engine alone, all other threads then compute by themselves; 0: torch's own setting for all."""
        self.config = config
        self._threads = threads
        self.port = 0
        self.metrics_port = 0
        self.admin_port = 0
        """Of the control plane; 0: that of all."""
        self.metrics = Metrics()
        self._backend, self._changes = BackendSlot(), ChangeLog()
        self._drop: DropFolder | None = None
        self._watching: asyncio.Task[None] | None = None
        self._health = health_aio.HealthServicer()
        self._metrics_server: tuple[WSGIServer, threading.Thread] | None = None
        self.died = asyncio.Event()
        self._calls = StatusInterceptor(self.metrics)
        self._grpc = self._made()
        self._control = self._grpc if config.admin_address is None else self._made()

    def _made(self) -> grpc.aio.Server:
        # Far above what the engine's queue and the uploads' limit let through: those refuse with a reason, this one only
        # keeps memory bounded, and health checks must never meet it.
        most = 4 * (self.config.max_batch + self.config.max_queue) + 1024
        return grpc.aio.server(interceptors=[self._calls], options=OPTIONS, maximum_concurrent_rpcs=most)

    @property
    def backend(self) -> Backend:
        return self._backend.get()

    async def start(self) -> None:
        """Opens the ports. Until `load` is done, health says NOT_SERVING and calls get UNAVAILABLE."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self.config, self._backend, access_log.AccessLog()), self._grpc
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(self._backend, self._changes, Watches()), self._control
        )
        store_pb2_grpc.add_StoreServiceServicer_to_server(
            StoreService(self._backend, self._changes, self.config.backup_root), self._control
        )
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.port = bind(self._grpc, self.config, self.config.address)
        if self.config.admin_address is None:
            add_common(self._grpc, self._health, (*GENERATION, *CONTROL), self.config)
        else:
            add_common(self._grpc, self._health, GENERATION, self.config)
            add_common(self._control, self._health, CONTROL, self.config)
            self.admin_port = bind(self._control, self.config, self.config.admin_address, "admin_port")
        self._start_metrics()
        for server in self._servers:
            await server.start()
        ports = {"port": self.port, "metrics_port": self.metrics_port, "admin_port": self.admin_port}
        log.info("listening", extra={"fields": ports})

    @property
    def _servers(self) -> tuple[grpc.aio.Server, ...]:
        return (self._grpc,) if self._control is self._grpc else (self._grpc, self._control)

    async def load(self, base: BaseModel | None = None) -> None:
        """Loads the model unless one is given, opens the store, warms up, and says SERVING."""
        config = self.config
        if base is None:
            load = partial(load_base_model, config.model, dtype=config.dtype, device=config.device)
            load = partial(load, cache=config.model_folder, deterministic=config.deterministic)
            load = partial(load, native=config.native_kernels)
            base = await run_detached(load, lambda _: None)
        loop = asyncio.get_running_loop()

        def on_death() -> None:
            loop.call_soon_threadsafe(self._engine_died)

        backend = await run_detached(
            partial(Backend, config, base, self.metrics, loop, on_death, self._threads), Backend.close
        )
        try:
            await backend.warm_up()
        except BaseException:
            await asyncio.to_thread(backend.close)
            raise
        self._backend.set(backend)
        if config.watch_folder is not None:
            delete, folder = config.watch_delete, config.watch_folder
            memory = config.store / "watched.json"
            drop = DropFolder(
                folder, backend.store, config.max_adapter_bytes, self._changes, delete=delete, memory=memory
            )
            self._drop, self._watching = drop, asyncio.create_task(watch_folder(drop, backend))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", extra={"fields": _describe(backend, self.port, self.metrics_port)})

    def _engine_died(self) -> None:
        """Nothing can be served any more: say so, and let the owner end the process."""
        log.critical("the engine is dead; no longer serving")
        self.died.set()
        self._farewell = asyncio.ensure_future(self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuses new calls, lets running ones finish for `grace_s` (default: the configuration's drain_seconds), ends
        the rest, then closes everything."""
        self._backend.drain()
        await self._health.enter_graceful_shutdown()
        backend = None
        with contextlib.suppress(EngineStarting):
            backend = self._backend.get()
        if backend is not None:
            backend.engine.stop_accepting()
            backend.changes.close()  # a watch never ends by itself
        if self._drop is not None and self._watching is not None:
            self._drop.stop()
            self._watching.cancel()
        grace = self.config.drain_seconds if grace_s is None else grace_s
        await self._calls.wait_idle(grace)
        # Not the whole grace again: a health watch never ends by itself.
        await asyncio.gather(*(server.stop(min(grace, _FLUSH_S)) for server in self._servers))
        # Before the store, which its gauges read.
        if self._metrics_server is not None:
            (http, thread), self._metrics_server = self._metrics_server, None
            await asyncio.to_thread(http.shutdown)
            http.server_close()
            thread.join()
        if backend is not None:
            await asyncio.to_thread(backend.close)

    def _start_metrics(self) -> None:
        if not self.config.metrics:
            return
        host, port = self.config.metrics_host, self.config.metrics_port
        try:
            self._metrics_server = start_http_server(port, host, registry=self.metrics.registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: {error.strerror}", field="metrics_port"
            ) from error
        self.metrics_port = self._metrics_server[0].server_port

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *GENERATION, *CONTROL):
            await self._health.set(service, status)


def _describe(backend: Backend, port: int, metrics_port: int) -> dict[str, object]:
    base = backend.base
    return {
        "port": port,
        "metrics_port": metrics_port,
        "model": base.name,
        "architecture": base.architecture,
        "dtype": base.dtype_name,
        "device": str(base.device),
        "max_context_tokens": backend.engine_config.max_context_tokens,
        "adapters": backend.store.stats().registered_count,
    }
