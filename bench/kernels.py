"""The GPU operators beside plain torch and beside what the chip could do at best; a row each.

The ceilings, a large copy and a large product, are measured first; an operator's roofline time is the larger of its bytes,
each moved once, over the one and its operations over the other. Calls are replays of CUDA graphs over inputs that together
do not fit the chip's cache (`cold` says whether), operators and their competitors in turn; medians. Each result is compared
with float64 first: a row whose error is too large says so, is not timed, and the run fails at its end.

Usage: python -m bench.kernels [--only spectral] [--minutes 9] [--out bench/results/kernels]
       python -m bench.kernels --check     small shapes once, on any machine: TRITON_INTERPRET=1 without a GPU
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from bench.cases.common import TOLERANCE, Cell, Operator, Place, Trial
from bench.cases.low_rank import RANK, low_rank
from bench.cases.registry import OPERATORS
from bench.facts import append, device_conditions, read
from bench.roofline import Ceilings
from bench.timing import Clock, measured_ceilings

Row = dict[str, object]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(operator: Operator, cell: Cell, place: Place, clock: Clock, ceilings: Ceilings) -> Row:
    trial = operator.trial(cell, place)
    error, bound = trial.error(), TOLERANCE[place.dtype]
    row: Row = cell.row() | {
        "dtype": _name(place.dtype), "error": error, "error_bound": bound, "ok": error <= bound,
        "bytes": trial.work.bytes, "flops": trial.work.flops, "sets": trial.ours.sets,
        "cold": trial.ours.sets * trial.footprint >= place.cold_bytes > 0,
    }  # fmt: skip
    return row | times(operator, cell, place, clock, ceilings, trial) if row["ok"] else row


def times(operator: Operator, cell: Cell, place: Place, clock: Clock, ceilings: Ceilings, trial: Trial) -> Row:
    runs = {"ours": trial.ours}
    if trial.reference is not None:
        runs["reference"] = trial.reference
    if operator.lora:
        pairs = Cell("add_low_rank", cell.q, cell.widths, cell.rows, RANK, cell.popularity, cell.adapters)
        runs["lora"] = low_rank(pairs, place).ours
    found = clock.in_turn(runs)
    row: Row = {}
    for name, timed in found.items():
        row |= timed.row(name)
    least, taken = ceilings.seconds(trial.work), found["ours"].median
    return row | {
        "roofline_us": round(least * 1e6, 3),
        "bound": ceilings.bound(trial.work),
        "fraction": round(least / taken, 4),
        "bandwidth": ceilings.bandwidth,
        "rate": ceilings.rate,
        "ceilings_measured": ceilings.measured,
    }


def in_order(operators: list[Operator]) -> Iterator[tuple[Operator, Cell]]:
    """The most important cells of all operators first."""
    longest = max((len(one.cells) for one in operators), default=0)
    for begin in range(0, longest, 4):
        for operator in operators:
            for cell in operator.cells[begin : begin + 4]:
                yield operator, cell


def said(row: Row) -> str:
    where = f"{row['operator']:20} {row['shape']:>22} rows {row['rows']:<5} size {row['size']:<5} {row['popularity']:9}"
    if "problem" in row:
        return f"{where} FAILED: {row['problem']}"
    if not row["ok"]:
        return f"{where} WRONG: error {row['error']:.1e} above {row['error_bound']:.0e}"
    parts = [f"{row['ours_us']:10.1f} us {row['fraction']:6.1%} of the roofline"]
    parts += [f"{name} {row[f'{name}_us']:10.1f} us" for name in ("reference", "lora") if f"{name}_us" in row]
    return f"{where} error {row['error']:.0e} {', '.join(parts)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(operators: list[Operator], out: Path | None) -> list[Row]:
    """Every operator at small shapes, float32 and float16, and bfloat16 where there is a GPU."""
    place_of, rows = device(), []
    clock = Clock(place_of, samples=1)
    for name, dtype in _DTYPES.items():
        if name == "bfloat16" and place_of.type != "cuda":
            continue  # Triton's interpreter does not compute it
        place, ceilings = Place.of(place_of, dtype), Ceilings(10e9, 100e9)
        for operator in operators:
            for cell in operator.checks:
                rows.append(measure(operator, cell, place, clock, ceilings))
                print(f"{name:9}{said(rows[-1])}", flush=True)
                if out is not None:
                    append(rows[-1], out)
    return rows


def sweep(operators: list[Operator], dtype: torch.dtype, minutes: float, out: Path) -> list[Row]:
    place_of, started, rows, left = device(), time.monotonic(), [], 0
    place, about, clock = Place.of(place_of, dtype), device_conditions(place_of), Clock(place_of)
    ceilings = measured_ceilings(place_of, dtype)
    print(f"{ceilings.bandwidth / 1e12:.2f} TB/s copied, {ceilings.rate / 1e12:.0f} TFLOP/s multiplied")
    for operator, cell in in_order(operators):
        if time.monotonic() - started > 60 * minutes:
            left += 1
            continue
        try:
            rows.append(measure(operator, cell, place, clock, ceilings))
        except Exception as problem:  # one operator's fault must not cost the others their hour on a GPU
            traceback.print_exc()
            rows.append(cell.row() | {"dtype": _name(dtype), "ok": False, "problem": f"{problem!r:.500}"})
        gc.collect()
        append(rows[-1] | about, out)
        print(said(rows[-1]), flush=True)
        if "CUDA error" in str(rows[-1].get("problem")):
            print("the device is of no use any more")
            break
    if left:
        print(f"{left} cells were left out: {minutes} minutes are over")
    return rows


@click.command()
@click.option("--check", "checking", is_flag=True, help="Small shapes once, compared with float64.")
@click.option("--only", default="", help="Operators with this in their name.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True)
@click.option("--minutes", default=9.0, show_default=True, help="No cell is begun after this.")
@click.option("--plot-only", is_flag=True, help="Draws the rows that OUT.jsonl has.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="OUT.jsonl is appended to, OUT.png drawn.")
def main(checking: bool, only: str, dtype: str, minutes: float, plot_only: bool, out: Path | None) -> None:
    """Prints a line for each row; fails if one is wrong."""
    from bench.kernel_plots import plot

    operators = [one for one in OPERATORS if only in one.name]
    if not operators:
        raise click.ClickException(f"no operator has {only!r} in its name")
    torch.manual_seed(0)
    if checking:
        rows = check(operators, None if out is None else out.with_suffix(".jsonl"))
    else:
        if device().type != "cuda" and not plot_only:
            raise click.ClickException(
                "no CUDA device: --check works without one, and python -m bench.roofline predicts"
            )
        target = out or Path("bench/results/kernels")
        rows = (
            read(target.with_suffix(".jsonl"))
            if plot_only
            else sweep(operators, _DTYPES[dtype], minutes, target.with_suffix(".jsonl"))
        )
        plot(rows, target.with_suffix(".png"))
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        raise click.ClickException(f"{len(wrong)} of {len(rows)} rows are wrong")
    print(f"{len(rows)} rows, all right")


if __name__ == "__main__":
    main()
