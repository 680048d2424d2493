"""One server: ports open at once, NOT_SERVING until the model is warm, drained on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from functools import partial
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from overtone.api import access_log
from overtone.api.adapter_service import AdapterService
from overtone.api.backend import Backend, BackendSlot
from overtone.api.config import ServerConfig
from overtone.api.generation_service import GenerationService
from overtone.api.interceptor import StatusInterceptor
from overtone.api.metrics import Metrics
from overtone.api.threads import run_detached
from overtone.errors import ConfigError, EngineStarting
from overtone.models.base import BaseModel, load_base_model
from overtone.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
_FLUSH_S = 1.0
"""What the last answers may take to leave."""
_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)


class Server:
    """Use: `await start()`, `await load()`, then `await stop()`. Everything it owns is its own: several fit in a process."""

    def __init__(self, config: ServerConfig, threads: int = 0) -> None:
        """threads: of the engine alone, all other threads then compute by themselves; 0: torch's own setting for all."""
        self.config = config
        self._threads = threads
        self.port = 0
        self.metrics_port = 0
        self.metrics = Metrics()
        self._backend = BackendSlot()
        self._health = health_aio.HealthServicer()
        self._metrics_server: tuple[WSGIServer, threading.Thread] | None = None
        self.died = asyncio.Event()
        self._calls = StatusInterceptor(self.metrics)
        self._grpc = grpc.aio.server(
            interceptors=[self._calls],
            options=_options(),
            # Far above what the engine's queue and the uploads' limit let through: those refuse with a reason, this one
            # only keeps memory bounded, and health checks must never meet it.
            maximum_concurrent_rpcs=4 * (config.max_batch + config.max_queue) + 1024,
        )

    @property
    def backend(self) -> Backend:
        return self._backend.get()

    async def start(self) -> None:
        """Opens the ports. Until `load` is done, health says NOT_SERVING and calls get UNAVAILABLE."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self.config, self._backend, access_log.AccessLog()), self._grpc
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(self._backend), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if self.config.reflection:
            names = (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._grpc)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.port = self._bind()
        self._start_metrics()
        await self._grpc.start()
        log.info("listening", extra={"fields": {"port": self.port, "metrics_port": self.metrics_port}})

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
        await self._health.enter_graceful_shutdown()
        backend = None
        with contextlib.suppress(EngineStarting):
            backend = self._backend.get()
        if backend is not None:
            backend.engine.stop_accepting()
        grace = self.config.drain_seconds if grace_s is None else grace_s
        await self._calls.wait_idle(grace)
        # Not the whole grace again: a health watch never ends by itself.
        await self._grpc.stop(min(grace, _FLUSH_S))
        # Before the store, which its gauges read.
        if self._metrics_server is not None:
            (http, thread), self._metrics_server = self._metrics_server, None
            await asyncio.to_thread(http.shutdown)
            http.server_close()
            thread.join()
        if backend is not None:
            await asyncio.to_thread(backend.close)

    def _bind(self) -> int:
        address = self.config.address
        credentials = _credentials(self.config)
        try:
            if credentials is not None:
                return self._grpc.add_secure_port(address, credentials)
            return self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: port in use, host not ours, or bad TLS files",
                field="port",
            ) from error

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
        for service in ("", *_SERVICES):
            await self._health.set(service, status)


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A unary Generate is silent while it decodes; a client's keep-alive pings must not count as abuse.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
    ]


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    client_ca = config.tls_client_ca.read_bytes() if config.tls_client_ca else None
    pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


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
