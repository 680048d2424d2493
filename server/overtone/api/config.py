"""Every setting of the server, checked once. Flags, environment variables and file keys are made from these fields."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from overtone.api.tenants import tenant_weights
from overtone.engine.config import check_queue_share, check_step_tokens
from overtone.errors import ConfigError

MIB = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.")


def _about(help: str, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    return {"help": help, "least": least, "most": most}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class ServerConfig:
    """How one server runs. A wrong value raises ConfigError with the field's name."""

    model: str = field(
        default="demo", metadata=_about("Base model: 'demo' (the built-in one), a hub id, a folder or a GGUF file.")
    )
    store: Path = field(default=Path(".overtone"), metadata=_about("Folder that keeps the adapters."))
    model_cache: Path | None = field(
        default=None, metadata=_about("Folder that keeps converted GGUF models; unset: 'models' in the store.")
    )
    host: str = field(default="127.0.0.1", metadata=_about("Address to listen on."))
    port: int = field(default=50051, metadata=_about("gRPC port; 0: any free one.", least=0, most=65535))
    metrics: bool = field(default=True, metadata=_about("Serve Prometheus metrics over HTTP."))
    metrics_host: str = field(default="127.0.0.1", metadata=_about("Address of the metrics."))
    metrics_port: int = field(
        default=9464, metadata=_about("Port of the metrics; 0: any free one.", least=0, most=65535)
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=_about("Numbers to compute in.")
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_about("Where to compute."))
    adapter_root: tuple[Path, ...] = field(
        default=(), metadata=_about("Folder from which clients may load adapters by path; repeatable.")
    )
    strict_base: bool = field(default=False, metadata=_about("Refuse adapters that do not state this base model."))
    deterministic: bool = field(
        default=False,
        metadata=_about("Logits that do not depend on the batch to the last bit (float32 on the CPU); slower."),
    )
    native_kernels: bool = field(
        default=True, metadata=_about("Compile CPU kernels for this machine when it first serves (needs gcc).")
    )
    threads: int = field(default=0, metadata=_about("CPU threads for computing; 0: all cores.", least=0))
    max_batch: int = field(default=64, metadata=_about("Requests in one step.", least=1))
    max_step_tokens: int = field(default=512, metadata=_about("Prompt and decode tokens in one step.", least=1))
    max_context_tokens: int = field(
        default=0,
        metadata=_about("Prompt and completion together; 0: what the model allows and the cache holds.", least=0),
    )
    kv_cache_mib: int = field(
        default=0,
        metadata=_about(
            "Memory for keys and values, on a GPU for adapters too, in MiB; 0: 2048 on a CPU, 9/10 of what a GPU has free.",
            least=0,
        ),
    )
    page_tokens: int = field(default=16, metadata=_about("Tokens in one page of the key-value cache.", least=1))
    max_queue: int = field(default=512, metadata=_about("Requests that may wait; more are refused.", least=1))
    max_queue_tokens: int = field(
        default=1 << 21,
        metadata=_about("Tokens, prompt and completion, that waiting requests may need; more are refused.", least=1),
    )
    max_queue_share: float = field(
        default=0.5,
        metadata=_about("Part of the queue, of its requests and of its tokens, that one tenant may hold."),
    )
    prefix_cache: bool = field(
        default=True, metadata=_about("Share cached pages between requests of a tenant that begin alike.")
    )
    tenant_weight: tuple[str, ...] = field(
        default=(), metadata=_about("NAME=WEIGHT: a tenant's share of the service, by default 1; repeatable.")
    )
    default_max_new_tokens: int = field(
        default=256, metadata=_about("Completion length where a request names none.", least=1)
    )
    adapter_memory_mib: int = field(
        default=1024, metadata=_about("Memory of the host for resident adapters, in MiB.", least=1)
    )
    disk_mib: int = field(
        default=0,
        metadata=_about(
            "Disk for adapters that are in remote_store too, in MiB: the least recently used packs leave it; 0: no limit.",
            least=0,
        ),
    )
    remote_store: str | None = field(
        default=None,
        metadata=_about(
            "Object storage that keeps all adapters as well, as a URL (s3://bucket/prefix); needs the extra 'remote'."
        ),
    )
    keep_versions: int = field(
        default=10, metadata=_about("Versions of an adapter that are kept, the current one included.", least=1)
    )
    watch_folder: Path | None = field(
        default=None, metadata=_about("Folder whose subfolders are loaded as adapters when they are complete.")
    )
    watch_delete: bool = field(
        default=False, metadata=_about("Delete an adapter when its subfolder of watch_folder is removed.")
    )
    tracked_adapters: int = field(
        default=100_000,
        metadata=_about("Adapters with statistics of their own, about 0.5 KB each; the others share one.", least=2),
    )
    metrics_top_adapters: int = field(
        default=50,
        metadata=_about("Most used adapters that have Prometheus series by name; 0: none.", least=0, most=1000),
    )
    adapter_load_threads: int = field(
        default=32, metadata=_about("Adapters that may be on their way from disk to memory at once.", least=1)
    )
    max_adapter_mib: int = field(default=64, metadata=_about("Largest adapter accepted, in MiB.", least=1))
    max_inline_adapter_mib: int = field(
        default=4, metadata=_about("Largest adapter accepted within a request, in MiB, at most 15; 0: none.", least=0)
    )
    drain_seconds: float = field(
        default=30.0, metadata=_about("How long running requests may finish after SIGTERM.", least=0)
    )
    reflection: bool = field(default=True, metadata=_about("Answer gRPC reflection (grpcurl)."))
    tls_cert: Path | None = field(
        default=None, metadata=_about("PEM file of the server's certificate chain; needs tls_key.")
    )
    tls_key: Path | None = field(default=None, metadata=_about("PEM file of the server's private key; needs tls_cert."))
    tls_client_ca: Path | None = field(
        default=None, metadata=_about("PEM file of the authority whose client certificates are required.")
    )
    insecure_bind: bool = field(default=False, metadata=_about("Allow an address that others can reach without TLS."))
    log_format: Literal["text", "json"] = field(default="text", metadata=_about("Form of the log lines."))
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata=_about("Least level that is logged.")
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            _check_value(setting, hints[setting.name], getattr(self, setting.name))
        self._check_limits()
        self._check_folders()
        self._check_network()

    @property
    def address(self) -> str:
        """What gRPC binds, with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def tls(self) -> bool:
        return self.tls_cert is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        return _is_loopback(self.host)

    @property
    def model_folder(self) -> Path:
        """Where converted GGUF models are."""
        return self.model_cache or self.store / "models"

    @property
    def adapter_memory_bytes(self) -> int:
        return self.adapter_memory_mib * MIB

    @property
    def max_adapter_bytes(self) -> int:
        return self.max_adapter_mib * MIB

    @property
    def max_inline_adapter_bytes(self) -> int:
        return self.max_inline_adapter_mib * MIB

    def _check_limits(self) -> None:
        check_step_tokens(self.max_step_tokens, self.max_batch)
        check_queue_share(self.max_queue_share)
        tenant_weights(self.tenant_weight)
        self._check_store()
        if self.max_inline_adapter_mib > 15:
            raise ConfigError(
                f"max_inline_adapter_mib ({self.max_inline_adapter_mib}) must be at most 15: a message holds 16 MiB",
                field="max_inline_adapter_mib",
            )
        if self.max_adapter_mib > self.adapter_memory_mib:
            raise ConfigError(
                f"max_adapter_mib ({self.max_adapter_mib}) must not exceed adapter_memory_mib "
                f"({self.adapter_memory_mib}): such an adapter could never be resident",
                field="max_adapter_mib",
            )

    def _check_store(self) -> None:
        if self.remote_store is not None and not _URL.match(self.remote_store):
            raise ConfigError(
                f"remote_store must be a URL like s3://bucket/prefix, not {self.remote_store!r}", field="remote_store"
            )
        if self.disk_mib and self.remote_store is None:
            raise ConfigError("disk_mib needs remote_store: adapters would be nowhere else", field="disk_mib")
        if self.metrics_top_adapters >= self.tracked_adapters:
            raise ConfigError(
                f"metrics_top_adapters ({self.metrics_top_adapters}) must be less than tracked_adapters "
                f"({self.tracked_adapters})",
                field="metrics_top_adapters",
            )

    def _check_folders(self) -> None:
        if self.store.exists() and not self.store.is_dir():
            raise ConfigError(f"store: {self.store} is not a folder", field="store")
        for root in self.adapter_root:
            if not root.is_dir():
                raise ConfigError(f"adapter_root: {root} is not an existing folder", field="adapter_root")
        if self.watch_folder is None:
            if self.watch_delete:
                raise ConfigError("watch_delete needs watch_folder", field="watch_delete")
            return
        if not self.watch_folder.is_dir():
            raise ConfigError(f"watch_folder: {self.watch_folder} is not an existing folder", field="watch_folder")
        if self.store.resolve() in (folder := self.watch_folder.resolve(), *folder.parents):
            raise ConfigError(f"watch_folder: {self.watch_folder} is part of the store", field="watch_folder")

    def _check_network(self) -> None:
        for name, other in (("tls_cert", self.tls_key), ("tls_key", self.tls_cert), ("tls_client_ca", self.tls_cert)):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"{name}: {path} is not an existing file", field=name)
            if path is not None and other is None:
                raise ConfigError(f"{name} needs tls_cert and tls_key as well", field=name)
        if not (self.loopback or self.tls or self.insecure_bind):
            raise ConfigError(
                f"host {self.host} can be reached from other machines: set tls_cert and tls_key, or insecure_bind if "
                "something else protects it",
                field="host",
            )
        if self.metrics and not (_is_loopback(self.metrics_host) or self.insecure_bind):
            raise ConfigError(
                f"metrics_host {self.metrics_host} can be reached from other machines, and metrics have no TLS: set "
                "insecure_bind if something else protects them",
                field="metrics_host",
            )
        same_host = self.metrics and self.metrics_host == self.host
        if same_host and self.port and self.port == self.metrics_port:
            raise ConfigError(f"metrics_port must differ from port ({self.port})", field="metrics_port")


def _check_value(setting: Field[Any], hint: Any, value: Any) -> None:
    """One field alone: among its choices, or inside its range, or not empty."""
    name, least, most = setting.name, setting.metadata["least"], setting.metadata["most"]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}", field=name)
    if hint is str and not value:
        raise ConfigError(f"{name} must not be empty", field=name)
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {value}", field=name)
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", field=name)
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, not {value}", field=name)
