"""The two honest executions of DCFT on this CPU: the Kronecker form against the equivalent low-rank pair of rank R d.

Both prepared cores are the same map. In every setting their applications are timed in turn, and the ratio of the two is
taken within each round, because machines are noisy. Below 1 the Kronecker form is the faster one.

Usage: python -m bench.dcft_execution [--rounds 9] [--slice 0.002] [--out bench/results/dcft_execution.jsonl]
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from overtone.kernels import KroneckerCore, LowRankCore, PreparedCore, prepare
from overtone.kernels.prepared import prepare_kronecker

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)]
KERNEL_SIZES, RANKS, TOKENS = (2, 4, 8), (1, 4), (1, 16, 128)


@dataclass(frozen=True)
class Cell:
    """One setting: delta_W (p, q) of a d x d kernel and a subspace of the given rank, applied to some tokens."""

    p: int
    q: int
    d: int
    rank: int
    tokens: int


@dataclass(frozen=True)
class Timing:
    """Microseconds an application, one of each round."""

    kronecker: list[float]
    low_rank: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(k / r for k, r in zip(self.kronecker, self.low_rank, strict=True))


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--slice", "slice_s", default=0.002, show_default=True, help="Seconds each form runs in a round.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/dcft_execution.jsonl"))
def main(rounds: int, slice_s: float, out: Path) -> None:
    """Measures, prints a table of ratios, writes a row a setting to OUT."""
    cells = [
        Cell(p, q, d, rank, tokens)
        for (p, q), d, rank, tokens in itertools.product(SHAPES, KERNEL_SIZES, RANKS, TOKENS)
    ]
    with torch.inference_mode():
        timings = {cell: _measure(cell, rounds, slice_s) for cell in track(cells, "measuring")}
    conditions = _conditions(rounds, slice_s)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({**_row(cell, timing), **conditions}) + "\n" for cell, timing in timings.items())
    out.write_text("".join(rows), encoding="utf-8")
    _print({cell: timing.ratio for cell, timing in timings.items()})


def _measure(cell: Cell, rounds: int, slice_s: float) -> Timing:
    kronecker, low_rank = _both(cell)
    z = torch.randn(cell.tokens, cell.q, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kronecker.apply(z), low_rank.apply(z), rtol=1e-3, atol=1e-3)
    repeats = [_repeats(core, z, slice_s) for core in (kronecker, low_rank)]
    timing = Timing([], [])
    turns = [(kronecker, repeats[0], timing.kronecker), (low_rank, repeats[1], timing.low_rank)]
    for index in range(rounds):
        for core, count, times in turns[:: 1 if index % 2 == 0 else -1]:
            times.append(_microseconds(core, z, count))
    return timing


def _both(cell: Cell) -> tuple[PreparedCore, PreparedCore]:
    """The Kronecker form, and A kron I_d (R d, q) with B kron K^T (p, R d)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(cell.rank, cell.q // cell.d, generator=generator) / cell.q**0.5
    b = torch.randn(cell.p // cell.d, cell.rank, generator=generator)
    k = torch.randn(cell.d, cell.d, generator=generator)
    pair = LowRankCore(torch.kron(a, torch.eye(cell.d)), torch.kron(b, k.T.contiguous()))
    return prepare_kronecker(KroneckerCore(a, b, k)), prepare(pair)


def _repeats(core: PreparedCore, z: torch.Tensor, slice_s: float) -> int:
    """How many applications fill a slice, measured after a warm-up."""
    _microseconds(core, z, 3)
    return max(1, round(slice_s * 1e6 / _microseconds(core, z, 3)))


def _microseconds(core: PreparedCore, z: torch.Tensor, count: int) -> float:
    apply: Callable[[torch.Tensor], torch.Tensor] = core.apply
    started = time.perf_counter()
    for _ in range(count):
        apply(z)
    return (time.perf_counter() - started) / count * 1e6


def _conditions(rounds: int, slice_s: float) -> dict[str, object]:
    return {
        "rounds": rounds,
        "slice_s": slice_s,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _row(cell: Cell, timing: Timing) -> dict[str, object]:
    return {
        **asdict(cell),
        "kronecker_us_median": round(statistics.median(timing.kronecker), 2),
        "low_rank_us_median": round(statistics.median(timing.low_rank), 2),
        "ratio_median": round(timing.ratio, 4),
        "kronecker_us": [round(value, 2) for value in timing.kronecker],
        "low_rank_us": [round(value, 2) for value in timing.low_rank],
    }


def _print(ratios: dict[Cell, float]) -> None:
    table = Table(title="Time of the Kronecker form over that of the low-rank pair (median of rounds)")
    for column in ("p x q", "d", "R", *(f"{tokens} tokens" for tokens in TOKENS)):
        table.add_column(column, justify="right")
    for (p, q), d, rank in itertools.product(SHAPES, KERNEL_SIZES, RANKS):
        values = (f"{ratios[Cell(p, q, d, rank, tokens)]:.2f}" for tokens in TOKENS)
        table.add_row(f"{p} x {q}", str(d), str(rank), *values)
    Console().print(table)


if __name__ == "__main__":
    main()
