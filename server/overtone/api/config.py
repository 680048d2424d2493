"""Every setting of the server, checked once. Flags, environment variables and file keys are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from overtone.api.config_checks import check_folders, check_limits, check_network, check_store, check_value, is_loopback

MIB = 1 << 20


def _about(help: str, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    return {"help": help, "least": least, "most": most}


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
    admin_host: str = field(default="127.0.0.1", metadata=_about("Address to listen on for admin_port."))
    admin_port: int | None = field(
        default=None,
        metadata=_about(
            "Port of its own for everything that changes or lists adapters and the store, which 'port' then does not "
            "serve; 0: any free one.",
            least=0,
            most=65535,
        ),
    )
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
    backup_root: Path | None = field(
        default=None, metadata=_about("Folder below which clients may have the store copied; unset: they may not.")
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
    nice: int = field(
        default=0, metadata=_about("How far they stand back from all others, see nice(2).", least=0, most=19)
    )
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
            check_value(setting, hints[setting.name], getattr(self, setting.name))
        check_limits(self)
        check_store(self)
        check_folders(self)
        check_network(self)

    @property
    def address(self) -> str:
        """What gRPC binds."""
        return _address(self.host, self.port)

    @property
    def admin_address(self) -> str | None:
        """What gRPC binds for the control plane, None if it has no port of its own."""
        return None if self.admin_port is None else _address(self.admin_host, self.admin_port)

    @property
    def tls(self) -> bool:
        return self.tls_cert is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        return is_loopback(self.host)

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


def _address(host: str, port: int) -> str:
    """With brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
