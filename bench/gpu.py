"""Steps of a Llama-3-8B through the engine's device runner: what adapters add to the base model's, in one run.

Random weights of that shape, no download. Decoding steps of 1 to 256 rows, with as many distinct adapters as rows and with
fewer, of every family; prompts of 2048 tokens, adapted as they come and with one adapter merged into the weights. All
settings are measured round by round, in turn; `over_base` is the median of the ratios to the base model's step of the same
round, less 1. gpu_ms: the device's part, the recorded pass alone; step_ms: all of a step, several one after another. Beside
them: the base model's products alone, and a batch of which one row has an adapter. `predicted`: `bench.roofline`.

Usage: python -m bench.gpu [--rounds 7] [--past 512] [--minutes 9] [--out bench/results/gpu]
       python -m bench.gpu --tiny     a model of two small layers, on any machine: TRITON_INTERPRET=1 without a GPU
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch
from bench.facts import append, device_conditions, read
from bench.roofline import FAMILIES, Family
from bench.steps.cells import Row, decode_cells, prompt_cells
from bench.steps.measured import Rounds, checked, merging, packing, products
from bench.steps.plots import plot
from bench.steps.setting import Setting, Sizes, random_model

FULL = Sizes((1, 8, 64, 256), 512, 2048, 34)
TINY = Sizes((2,), 8, 20, 0.01)
TINY_FAMILIES = tuple(
    replace(family, size=size) for family, size in zip((FAMILIES[0], FAMILIES[1], FAMILIES[3]), (8, 40, 8), strict=True)
)
_PROMPTS = 8
_MERGED = tuple(f.name for f in FAMILIES[:3])


@click.command()
@click.option("--tiny", is_flag=True, help="Two layers of 64, wherever this is.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--times", default=5, show_default=True, help="Steps one after another, of each setting, in a round.")
@click.option("--past", default=FULL.past, show_default=True, help="Tokens behind a decoded row.")
@click.option("--minutes", default=9.0, show_default=True, help="No round is begun after this.")
@click.option("--plot-only", is_flag=True, help="Draws the rows that OUT.jsonl has.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/gpu"))
def main(tiny: bool, rounds: int, times: int, past: int, minutes: float, plot_only: bool, out: Path) -> None:
    """Writes OUT.jsonl (appended to) and draws OUT.png and OUT_prompt.png."""
    if plot_only:
        plot(read(out.with_suffix(".jsonl")), out.with_suffix(".png"))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not tiny:
        raise click.ClickException("no CUDA device: --tiny works without one, and python -m bench.roofline predicts")
    # The interpreter computes no bfloat16; float32 weights would be packed for the CPU, and nothing could be merged.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    sizes, families = (TINY, TINY_FAMILIES) if tiny else (replace(FULL, past=past), FAMILIES)
    about = device_conditions(device) | {
        "model": "two layers of 64" if tiny else "Llama-3-8B shape, random weights",
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows: list[Row] = []
    with torch.inference_mode():
        setting = Setting(random_model(tiny, device, dtype), sizes)
        try:
            for row in run(setting, families, rounds, times, time.monotonic() + 60 * minutes):
                rows.append(row | about)
                append(rows[-1], out.with_suffix(".jsonl"))
                show(row)
        finally:
            setting.runner.close()
            if rows:
                plot(rows, out.with_suffix(".png"))


def run(setting: Setting, families: tuple[Family, ...], rounds: int, times: int, until: float) -> Iterator[Row]:
    """Rows as soon as they are there: what fails later takes none away."""
    groups = [decode_cells(n, families) for n in setting.sizes.rows]
    prompts = prompt_cells(setting.sizes.prompt, families, min(_PROMPTS, max(setting.sizes.rows)))
    every = [*(cell for group in groups for cell in group), *prompts]
    fit = checked(setting, every)
    yield from packing(setting, families)
    yield from products(setting, times)
    measured = Rounds(setting, times)
    for number in range(rounds):
        if number and time.monotonic() > until:
            print(f"{rounds - number} rounds were left out: the minutes are over")
            break
        for group in groups:
            measured.decode([cell for cell in group if cell in fit])
        measured.prompts([cell for cell in prompts if cell in fit])
    yield from (cell.row(setting) for cell in fit)
    yield from merging(setting, [one for one in families if one.name in _MERGED], min(rounds, 3), times)
    if len(fit) < len(every):
        raise click.ClickException(f"{len(every) - len(fit)} of {len(every)} settings were wrong and not measured")


def show(row: Row) -> None:
    parts = [f"{name} {row[name]}" for name in ("gpu_ms", "step_ms", "bytes", "first_ms") if row.get(name) is not None]
    if row.get("over_base") is not None:
        parts.append(f"over base {row['over_base']:+.1%}")
    if row.get("predicted") is not None:
        parts.append(f"predicted {row['predicted']:+.1%}")
    where = f"{row['phase']:9}{row['label']:36} rows {row['rows']:<5} distinct {row['distinct']:<4}"
    print(f"{where} {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
