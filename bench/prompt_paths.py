"""What a prompt's token costs with an implicit and with a materialised delta, beside what the cost model says of it.

DCT frames and a sparse core of n entries, 512 tokens, in turn; medians; ratios within one run. `modelled` is what the
constants of `overtone.models.materialised` say of the measured ratio; the last lines are these constants as this machine has
them, by least squares.

Usage: python -m bench.prompt_paths [--rounds 15] [--out bench/results/prompt_paths.jsonl]
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from bench.hot_load import conditions

from overtone.kernels import DCT, FrameBank, apply_core, compress, sparse_core
from overtone.kernels.native import native_kernels
from overtone.models import materialised

TOKENS = 512
SHAPES = ((576, 576), (1536, 576), (576, 1536))
ENTRIES = (1000, 3000, 10_000, 30_000, 100_000)


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/prompt_paths.jsonl"))
def main(rounds: int, out: Path) -> None:
    """Prints a line for each case and writes OUT."""
    rows = []
    for shape in SHAPES:
        for entries in ENTRIES:
            row = measure(shape, entries, rounds)
            rows.append(row)
            print(json.dumps(row))
    entry, coefficient, step = _fitted(rows)
    print(f"SPARSE_ENTRY {entry:.1f}, now {materialised.SPARSE_ENTRY}")
    print(f"COEFFICIENT {coefficient:.1f}, now {materialised.COEFFICIENT}")
    print(f"TRANSFORM_STEP {step:.1f}, now {materialised.TRANSFORM_STEP}")
    about = conditions()
    rows = [{**row, **about} for row in rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(shape: tuple[int, int], entries: int, rounds: int) -> dict[str, Any]:
    """Seconds of each part, interleaved."""
    (p, q), generator = shape, torch.Generator().manual_seed(entries)
    places = torch.randperm(p * q, generator=generator)[:entries].sort().values
    core = compress(
        sparse_core((places // q).int(), (places % q).int(), torch.randn(entries, generator=generator), shape)
    )
    native = native_kernels()
    bank = FrameBank(torch.device("cpu"), native)
    x, delta, y = torch.randn(TOKENS, q), torch.randn(q, p), torch.zeros(TOKENS, p)

    def cores(z: torch.Tensor) -> torch.Tensor:
        return core.apply(z) if native is None else apply_core(core, z, native)

    z = bank.analyse(DCT, x, 0)
    u = cores(z)
    parts: dict[str, Callable[[], object]] = {
        "dense": lambda: y.addmm_(x, delta),
        "core": lambda: cores(z),
        "frames": lambda: (bank.analyse(DCT, x, 0), bank.add_synthesis(DCT, u, y) or bank.synthesise(DCT, u, p)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    dense, cored, framed = (statistics.median(seconds[name][1:]) for name in ("dense", "core", "frames"))
    steps = p * math.log2(p) + q * math.log2(q)
    modelled = materialised.SPARSE_ENTRY * entries + materialised.COEFFICIENT * (p + q)
    modelled += materialised.TRANSFORM_STEP * steps
    return {
        "shape": list(shape),
        "entries": entries,
        "tokens": TOKENS,
        "implicit_over_dense": round((cored + framed) / dense, 3),
        "modelled": round(modelled / (p * q), 3),
        "core": round(cored / dense * p * q),
        "transform_step": round(framed / dense * p * q / steps, 2),
    }


def _fitted(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Cost of an entry and of a coefficient, and the median of a transform's step, in multiply-adds."""
    # Relative errors count: every row is divided by what it should be.
    known = torch.tensor([[row["entries"], sum(row["shape"])] for row in rows], dtype=torch.float64)
    cost = torch.tensor([row["core"] for row in rows], dtype=torch.float64)
    fitted = torch.linalg.lstsq(known / cost[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution
    return float(fitted[0]), float(fitted[1]), statistics.median(row["transform_step"] for row in rows)


if __name__ == "__main__":
    main()
