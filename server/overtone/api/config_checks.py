"""What makes a configuration sound: each setting alone, then with the others. Raises ConfigError with the field's name."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import Field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from overtone.api.tenants import tenant_weights
from overtone.engine.config import check_queue_share, check_step_tokens
from overtone.errors import ConfigError

if TYPE_CHECKING:
    from overtone.api.config import ServerConfig

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.")


def check_value(setting: Field[Any], hint: Any, value: Any) -> None:
    """One field alone: among its choices, or inside its range, or not empty."""
    name, least, most = setting.name, setting.metadata["least"], setting.metadata["most"]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}", field=name)
    if hint is str and not value:
        raise ConfigError(f"{name} must not be empty", field=name)
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {value}", field=name)
    if value is None:
        return
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", field=name)
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, not {value}", field=name)


def check_limits(config: ServerConfig) -> None:
    check_step_tokens(config.max_step_tokens, config.max_batch)
    check_queue_share(config.max_queue_share)
    tenant_weights(config.tenant_weight)
    if config.max_inline_adapter_mib > 15:
        raise ConfigError(
            f"max_inline_adapter_mib ({config.max_inline_adapter_mib}) must be at most 15: a message holds 16 MiB",
            field="max_inline_adapter_mib",
        )
    if config.max_adapter_mib > config.adapter_memory_mib:
        raise ConfigError(
            f"max_adapter_mib ({config.max_adapter_mib}) must not exceed adapter_memory_mib "
            f"({config.adapter_memory_mib}): such an adapter could never be resident",
            field="max_adapter_mib",
        )


def check_store(config: ServerConfig) -> None:
    if config.remote_store is not None and not _URL.match(config.remote_store):
        raise ConfigError(
            f"remote_store must be a URL like s3://bucket/prefix, not {config.remote_store!r}", field="remote_store"
        )
    if config.disk_mib and config.remote_store is None:
        raise ConfigError("disk_mib needs remote_store: adapters would be nowhere else", field="disk_mib")
    if config.metrics_top_adapters >= config.tracked_adapters:
        raise ConfigError(
            f"metrics_top_adapters ({config.metrics_top_adapters}) must be less than tracked_adapters "
            f"({config.tracked_adapters})",
            field="metrics_top_adapters",
        )


def check_folders(config: ServerConfig) -> None:
    if config.store.exists() and not config.store.is_dir():
        raise ConfigError(f"store: {config.store} is not a folder", field="store")
    for root in config.adapter_root:
        if not root.is_dir():
            raise ConfigError(f"adapter_root: {root} is not an existing folder", field="adapter_root")
    if config.backup_root is not None and not config.backup_root.is_dir():
        raise ConfigError(f"backup_root: {config.backup_root} is not an existing folder", field="backup_root")
    if config.watch_folder is None:
        if config.watch_delete:
            raise ConfigError("watch_delete needs watch_folder", field="watch_delete")
        return
    if not config.watch_folder.is_dir():
        raise ConfigError(f"watch_folder: {config.watch_folder} is not an existing folder", field="watch_folder")
    if config.store.resolve() in (folder := config.watch_folder.resolve(), *folder.parents):
        raise ConfigError(f"watch_folder: {config.watch_folder} is part of the store", field="watch_folder")


def check_network(config: ServerConfig) -> None:
    for name, other in (("tls_cert", config.tls_key), ("tls_key", config.tls_cert), ("tls_client_ca", config.tls_cert)):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise ConfigError(f"{name}: {path} is not an existing file", field=name)
        if path is not None and other is None:
            raise ConfigError(f"{name} needs tls_cert and tls_key as well", field=name)
    hosts = {"host": config.host, **({} if config.admin_port is None else {"admin_host": config.admin_host})}
    for name, host in hosts.items():
        if is_loopback(host) or config.tls or config.insecure_bind:
            continue
        raise ConfigError(
            f"{name} {host} can be reached from other machines: set tls_cert and tls_key, or insecure_bind if "
            "something else protects it",
            field=name,
        )
    if config.admin_port and (config.admin_host, config.admin_port) == (config.host, config.port):
        raise ConfigError(f"admin_port must differ from port ({config.port})", field="admin_port")
    if config.metrics and not (is_loopback(config.metrics_host) or config.insecure_bind):
        raise ConfigError(
            f"metrics_host {config.metrics_host} can be reached from other machines, and metrics have no TLS: set "
            "insecure_bind if something else protects them",
            field="metrics_host",
        )
    same_host = config.metrics and config.metrics_host == config.host
    if same_host and config.port and config.port == config.metrics_port:
        raise ConfigError(f"metrics_port must differ from port ({config.port})", field="metrics_port")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
