"""Where and how the server listens: the channel's options, TLS, the port."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from overtone.api.config import ServerConfig
from overtone.errors import ConfigError
from overtone.v1 import adapters_pb2, generation_pb2, store_pb2

MAX_MESSAGE_BYTES = 16 << 20

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A unary Generate is silent while it decodes; a client's keep-alive pings must not count as abuse.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that vanished without a word keeps its calls, and their places, no longer.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
)

GENERATION = (generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,)
CONTROL = (
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    store_pb2.DESCRIPTOR.services_by_name["StoreService"].full_name,
)
"""Names of services, by the port that they are on where there are two."""


def add_common(
    server: grpc.aio.Server, health: health_aio.HealthServicer, services: tuple[str, ...], config: ServerConfig
) -> None:
    """What every port has: health, and reflection of its services."""
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if config.reflection:
        names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)


def bind(server: grpc.aio.Server, config: ServerConfig, address: str, field: str = "port") -> int:
    """The port that it listens on. field: the setting that `address` is made of. Raises `ConfigError`."""
    credentials = _credentials(config)
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: port in use, host not ours, or bad TLS files", field=field
        ) from error


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    client_ca = _read("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    pair = (_read("tls_key", config.tls_key), _read("tls_cert", config.tls_cert))
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}", field=field) from error
