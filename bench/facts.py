"""Where and when a row was measured, and how rows are kept. Needs torch alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch


def conditions() -> dict[str, object]:
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_conditions(device: torch.device) -> dict[str, object]:
    """`conditions`, and those of a GPU; of the CPU, that Triton's interpreter computed there."""
    about = conditions() | {"triton": _version("triton"), "transformers": _version("transformers")}
    if device.type != "cuda":
        return about | {"device": "Triton's interpreter"}
    found = torch.cuda.get_device_properties(device)
    return about | {
        "device": found.name,
        "capability": capability(device),
        "multiprocessors": found.multi_processor_count,
        "l2_mib": found.L2_cache_size >> 20,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def capability(device: torch.device) -> int:
    """90 of sm_90; where there is no GPU as well."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def commit() -> str:
    """What is measured, abbreviated; in a copy without its history what BENCH_COMMIT says."""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or os.environ.get("BENCH_COMMIT", "")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def append(row: Mapping[str, object], path: Path) -> None:
    """A run that is cut short keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return shown.stdout.partition("\n")[0].strip()
