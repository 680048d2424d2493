"""How long a new adapter takes from its bytes to a lease on it in memory, durably stored: the first of its kind, and more.

On q and v of the default model's shapes (30 layers, 60 modules). Split into the upload (parse, encode, fsync, catalogue) and
the first use (read, verify, decode, make resident). The first row of a family includes what later ones find made: for
FourierFT its locations. Beside them a store that has been opened anew.

Usage: python -m bench.hot_load [--count 20] [--out bench/results/hot_load.jsonl]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from overtone.adapters import AdapterStore, BaseDescription, StoreConfig

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(30)
    for name, shape in {"q_proj": (576, 576), "v_proj": (192, 576)}.items()
}
BASE = BaseDescription("SmolLM2-135M shapes", "f" * 64, SHAPES)
Tensors = dict[str, torch.Tensor]


def fourierft() -> Tensors:
    return {f"base_model.model.{m}.fourierft_spectrum": torch.randn(1000) for m in SHAPES}


def loca() -> Tensors:
    tensors = {}
    for module, (p, q) in SHAPES.items():
        tensors[f"base_model.model.{module}.spectrum"] = torch.randn(1000)
        places = torch.stack([torch.randint(0, p, (1000,)), torch.randint(0, q, (1000,))])
        tensors[f"base_model.model.{module}.spectrum_indices"] = places.int()
    return tensors


def lora() -> Tensors:
    tensors = {}
    for module, (p, q) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(16, q)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(p, 16)
    return tensors


KINDS: dict[str, tuple[dict[str, object], Callable[[], Tensors]]] = {
    "FourierFT n=1000": ({"peft_type": "FOURIERFT", "n_frequency": 1000, "random_loc_seed": 777}, fourierft),
    "LoCA n=1000": ({"peft_type": "LOCA", "n_frequency": 1000}, loca),
    "LoRA r=16": ({"peft_type": "LORA", "r": 16, "lora_alpha": 16}, lora),
}


def load(store: AdapterStore, name: str, config: bytes, weights: bytes) -> tuple[float, float]:
    """Milliseconds of the upload and of the first use."""
    started = time.perf_counter()
    with store.begin_upload() as upload:
        upload.write("adapter_config.json", config)
        upload.write("adapter_model.safetensors", weights)
        store.commit_upload(upload, name)
    uploaded = time.perf_counter()
    store.acquire(name).release()
    return (uploaded - started) * 1e3, (time.perf_counter() - uploaded) * 1e3


def measure(kind: str, count: int, root: Path) -> dict[str, object]:
    settings, make = KINDS[kind]
    config = json.dumps({**settings, "target_modules": ["q_proj", "v_proj"]}).encode()
    store_config = StoreConfig(root=root, memory_bytes=1 << 30, max_upload_bytes=1 << 26)
    store = AdapterStore(store_config, BASE)
    times = [load(store, f"a{i}", config, save(make())) for i in range(count + 1)]
    store.close()
    again = AdapterStore(store_config, BASE)
    reopened = []
    for i in range(count + 1):
        started = time.perf_counter()
        again.acquire(f"a{i}").release()
        reopened.append((time.perf_counter() - started) * 1e3)
    again.close()
    upload, use = (statistics.median(column) for column in zip(*times[1:], strict=True))
    total = statistics.median(a + b for a, b in times[1:])
    return {
        "kind": kind,
        "modules": len(SHAPES),
        "first_ms": round(sum(times[0]), 2),
        "upload_ms": round(upload, 2),
        "first_use_ms": round(use, 2),
        "total_ms": round(total, 2),
        "total_ms_best": round(min(a + b for a, b in times[1:]), 2),
        "total_ms_worst": round(max(a + b for a, b in times[1:]), 2),
        "reopened_ms": round(statistics.median(reopened), 2),
    }


@click.command()
@click.option("--count", default=20, show_default=True, help="Adapters after the first.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/hot_load.jsonl"))
def main(count: int, out: Path) -> None:
    """Prints a table and writes a row a family to OUT."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    with tempfile.TemporaryDirectory() as warm:  # torch's own first calls are nobody's hot load
        measure("LoRA r=16", 1, Path(warm))
    rows = []
    for number, kind in enumerate(KINDS):
        with tempfile.TemporaryDirectory() as root:
            rows.append(measure(kind, count, Path(root) / str(number)))
    columns = ("kind", "first_ms", "total_ms", "upload_ms", "first_use_ms", "reopened_ms")
    table = Table(*columns, title="Hot load on 60 modules, medians in ms (first: alone)")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row | about) + "\n" for row in rows), encoding="utf-8")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
