"""What a prompt's token costs with an implicit and with a materialised delta, beside what the cost model says of it.

DCT frames and a sparse core of n entries, 512 tokens, in turn; medians; ratios within one run. The last two lines are the
model's constants (`overtone.models.materialised`) as this machine has them.

Usage: python -m bench.prompt_paths [--rounds 15] [--out bench/results/prompt_paths.jsonl]
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

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
    rows, entry, step = [], [], []
    for shape in SHAPES:
        for entries in ENTRIES:
            row = measure(shape, entries, rounds)
            rows.append({**row, **conditions()})
            entry.append(row["sparse_entry"])
            step.append(row["transform_step"])
            print(json.dumps(row))
    print(f"SPARSE_ENTRY {statistics.median(entry):.1f}, now {materialised.SPARSE_ENTRY}")
    print(f"TRANSFORM_STEP {statistics.median(step):.1f}, now {materialised.TRANSFORM_STEP}")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(shape: tuple[int, int], entries: int, rounds: int) -> dict[str, object]:
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
    return {
        "shape": list(shape),
        "entries": entries,
        "tokens": TOKENS,
        "implicit_over_dense": round((cored + framed) / dense, 3),
        "sparse_entry": round(cored / dense * p * q / entries, 1),
        "transform_step": round(framed / dense * p * q / steps, 1),
    }


if __name__ == "__main__":
    main()
