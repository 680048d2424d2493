"""What a prompt's token costs with an implicit and with a materialised delta, beside what the cost model says of it.

DCT frames and a sparse core of n entries, 512 tokens, by native kernels and by torch's operators, in turn; medians; ratios
within one run. `modelled` is what the constants of `overtone.models.materialised` say of the measured ratio; the last lines
are these constants as this machine has them, by least squares.

Usage: python -m bench.prompt_paths [--rounds 15] [--out bench/results/prompt_paths.jsonl]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from bench.facts import conditions
from bench.native_kernels import in_turn

from overtone.kernels import DCT, CsrCore, FrameBank, compress, sparse_core
from overtone.kernels.native import NativeKernels, OwnedRows, native_kernels, sparse_address
from overtone.models import materialised

TOKENS = 512
SHAPES = ((576, 576), (1536, 576), (576, 1536))
ENTRIES = (1000, 3000, 10_000, 30_000, 100_000)


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/prompt_paths.jsonl"))
def main(rounds: int, out: Path) -> None:
    """Prints a line for each case and writes OUT."""
    rows: list[dict[str, Any]] = []
    for native in dict.fromkeys((native_kernels(), None)):
        own = []
        for shape in SHAPES:
            for entries in ENTRIES:
                own.append(measure(shape, entries, rounds, native))
                print(json.dumps(own[-1]))
        (entry, step), model = _fitted(own), _model(native)
        print(f"an entry {entry:.1f}, now {model.entry}; a step of a transform {step:.1f}, now {model.step}")
        rows += own
    about = conditions()
    out.write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows), encoding="utf-8")


def measure(shape: tuple[int, int], entries: int, rounds: int, native: NativeKernels | None) -> dict[str, Any]:
    """Medians of both ways, interleaved."""
    (p, q), generator = shape, torch.Generator().manual_seed(entries)
    places = torch.randperm(p * q, generator=generator)[:entries].sort().values
    core = compress(
        sparse_core((places // q).int(), (places % q).int(), torch.randn(entries, generator=generator), shape)
    )
    bank = FrameBank(torch.device("cpu"), native)
    x, delta, y = torch.randn(TOKENS, q), torch.randn(q, p), torch.zeros(TOKENS, p)
    dense, implicit = in_turn((lambda: y.addmm_(x, delta), _implicit(core, bank, x, y)), rounds)
    return {
        "shape": list(shape),
        "entries": entries,
        "tokens": TOKENS,
        "native": native is not None,
        "implicit_over_dense": round(implicit / dense, 3),
        "modelled": round(_model(native).implicit(entries, shape) / (p * q), 3),
    }


def _model(native: NativeKernels | None) -> materialised.TokenCost:
    return materialised.BY_TORCH if native is None else materialised.BY_NATIVE_KERNELS


def _implicit(core: CsrCore, bank: FrameBank, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    native, p, q = bank.native, y.shape[1], x.shape[1]
    of_p, of_q = bank.plan(DCT, p), bank.plan(DCT, q)
    if native is None or of_p is None or of_q is None:
        return lambda: y.add_(bank.synthesise(DCT, core.apply(bank.analyse(DCT, x, q)), p))
    address = torch.tensor([[sparse_address(core.rows, core.cols, core.values)]])
    owned = OwnedRows(None, torch.zeros(len(x), dtype=torch.int64), address)
    z = torch.empty(native.room_in_lanes(len(x), of_q))
    return lambda: native.add_spectral(of_q, x, z, owned, [(of_p, 0, y)])


def _fitted(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Cost of an entry and of a step of a transform, in multiply-adds."""
    # Relative errors count: every row is divided by what it should be.
    known = torch.tensor([[row["entries"], materialised.steps(row["shape"])] for row in rows], dtype=torch.float64)
    cost = torch.tensor([row["implicit_over_dense"] * row["shape"][0] * row["shape"][1] for row in rows])
    fitted = torch.linalg.lstsq(known / cost[:, None].double(), torch.ones(len(rows), 1, dtype=torch.float64)).solution
    return float(fitted[0]), float(fitted[1])


if __name__ == "__main__":
    main()
