"""How both clients connect: retries, limits and keep-alive of the channel, and how readiness is asked."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from overtone.v1 import adapters_pb2, generation_pb2, store_pb2

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
STORE = store_pb2.DESCRIPTOR.services_by_name["StoreService"].full_name
MAX_MESSAGE_BYTES = 16 << 20
READY_REQUEST = health_pb2.HealthCheckRequest(service=GENERATION)
READY_POLL_S = 0.1
_ONCE = ("UploadAdapter", "ImportAdapters", "LoadAdapter", "ActivateAdapterVersion", "DeleteAdapter")

# The health service does not answer, or does not know our service yet.
NOT_READY_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND})


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def metadata_of(pairs: Iterable[tuple[str, str | bytes]]) -> Metadata:
    return tuple((key.lower(), value) for key, value in pairs)


def options(address: str) -> list[tuple[str, Any]]:
    """Channel options for this address."""
    chosen: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(_service_config())),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A whole completion may be silent for longer than two pings.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if _is_local(address):
        # An http_proxy in the environment cannot reach this machine's loopback.
        chosen.append(("grpc.enable_http_proxy", 0))
    return chosen


def _service_config() -> dict[str, Any]:
    """Retries a call that found no server. Not uploads, whose streams cannot be sent twice, nor what would do something else
    or fail the second time, if it was done the first time and only the answer was lost."""
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    everything = {"name": [{"service": each} for each in (GENERATION, ADAPTERS, STORE)], "retryPolicy": policy}
    # The entry for a method replaces that of its service.
    names = [*((ADAPTERS, method) for method in _ONCE), (STORE, "BackupStore")]
    once = {"name": [{"service": service, "method": method} for service, method in names]}
    return {"methodConfig": [everything, once]}


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
