"""How long a new adapter takes from its bytes to a lease on it in memory, durably stored.

On q and v of the default model's shapes (30 layers, 60 modules), through `AdapterStore`, in three parts:

    admit     every check, the fold into frames and cores, and the blobs
    commit    all else of the upload: received, written, synced, in the catalogue, in memory
    acquire   a lease on it

The first adapter of a kind also pays for what later ones find made: its recipe, its locations. `reopened` is
an acquire alone, in a store that has been closed and opened again: read, verified, decoded, made resident.

Usage: python -m bench.hot_load [--count 20] [--out bench/results/hot_load.jsonl]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import click
import torch
from bench.facts import conditions
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from overtone.adapters import AdapterFiles, AdapterStore, BaseDescription, StoreConfig
from overtone.adapters.admission import Admission
from overtone.adapters.recipes import Admitted

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(30)
    for name, shape in {"q_proj": (576, 576), "v_proj": (192, 576)}.items()
}
BASE = BaseDescription("SmolLM2-135M shapes", "f" * 64, SHAPES)
Tensors = dict[str, torch.Tensor]
Times = dict[str, float]
"""Milliseconds by part."""


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


@contextmanager
def admission_timed() -> Iterator[list[float]]:
    """The milliseconds of each admission that a store does inside."""
    times: list[float] = []
    admit = Admission.admit

    def timed(self: Admission, files: AdapterFiles) -> Admitted:
        started = time.perf_counter()
        try:
            return admit(self, files)
        finally:
            times.append((time.perf_counter() - started) * 1e3)

    with patch.object(Admission, "admit", timed):
        yield times


def load(store: AdapterStore, name: str, config: bytes, weights: bytes) -> Times:
    started = time.perf_counter()
    with admission_timed() as admissions, store.begin_upload() as upload:
        upload.write("adapter_config.json", config)
        upload.write("adapter_model.safetensors", weights)
        store.commit_upload(upload, name)
    uploaded = (time.perf_counter() - started) * 1e3
    acquired = acquire(store, name)
    commit = uploaded - admissions[0]
    return {"admit": admissions[0], "commit": commit, "acquire": acquired, "total": uploaded + acquired}


def acquire(store: AdapterStore, name: str) -> float:
    started = time.perf_counter()
    lease = store.acquire(name)
    taken = (time.perf_counter() - started) * 1e3
    lease.release()
    return taken


def measure(kind: str, count: int, root: Path) -> list[dict[str, object]]:
    """The first adapter, the median of the others, and both again after the store was reopened."""
    settings, make = KINDS[kind]
    config = json.dumps({**settings, "target_modules": ["q_proj", "v_proj"]}).encode()
    store_config = StoreConfig(root=root, memory_bytes=1 << 30, max_upload_bytes=1 << 26)
    store = AdapterStore(store_config, BASE)
    fresh = [load(store, f"a{i}", config, save(make())) for i in range(count + 1)]
    store.close()
    again = AdapterStore(store_config, BASE)
    reopened = [{"acquire": acquire(again, f"a{i}")} for i in range(count + 1)]
    again.close()
    return [
        row(kind, f"{when}{which}", times)
        for when, samples in (("", fresh), ("reopened, ", reopened))
        for which, times in (("first", samples[:1]), ("next", samples[1:]))
    ]


def row(kind: str, adapters: str, samples: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Medians by part, and every sample of the last, which is all of it."""
    whole = list(samples[0])[-1]
    medians = {f"{part}_ms": round(statistics.median(s[part] for s in samples), 2) for part in samples[0]}
    every = [round(s[whole], 2) for s in samples]
    return {"kind": kind, "modules": len(SHAPES), "adapters": adapters, **medians, "samples_ms": every}


@click.command()
@click.option("--count", default=20, show_default=True, help="Adapters after the first.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/hot_load.jsonl"))
def main(count: int, out: Path) -> None:
    """Prints a table and writes its rows to OUT."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    rows = []
    with tempfile.TemporaryDirectory() as root:
        measure("LoRA r=16", 1, Path(root) / "warm")  # torch's own first calls are nobody's hot load
        for number, kind in enumerate(KINDS):
            rows += measure(kind, count, Path(root) / str(number))
    parts = ("admit", "commit", "acquire", "total")
    table = Table("kind", "adapters", *parts, "best", "worst", title="Hot load on 60 modules, ms (next: medians)")
    for one in rows:
        samples = one["samples_ms"]
        assert isinstance(samples, list)
        cells = (one["kind"], one["adapters"], *(one.get(f"{p}_ms", "") for p in parts), min(samples), max(samples))
        table.add_row(*map(str, cells))
    Console().print(table)
    about = conditions()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(one | about) + "\n" for one in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
