"""What adapters of each method are worth: score against trained numbers and bytes, three real tasks, a CPU, some hours.

    rates        learning rates of each method, tried with its middle budget on the validation part, first seed
    tuned        every method at three budgets and every seed, scored on the test part from the files that were saved
    compressed   the trained LoRAs as their largest DCT coefficients, at several sizes, and a random delta beside them

Rows that are there are not computed again, so that a run may be interrupted and go on.

Usage: python -m bench.quality [--tasks pronounce,feel,inflect] [--methods LoRA,LoCA] [--seeds 0,1,2] [--budget-minutes 240]
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import click
from bench.quality.arms import LABELS
from bench.quality.document import DOCUMENT, documented
from bench.quality.plots import plot_compression, plot_scores
from bench.quality.run import Grid, fill
from bench.quality.tasks import TASKS, Sizes
from bench.quality.train import Pace
from bench.quality.workbench import Row, Setting
from rich.console import Console

_CONSOLE = Console()


@click.command()
@click.option("--tasks", default=",".join(TASKS), show_default=True)
@click.option("--methods", default=";".join(LABELS), show_default=True, help="Separated by semicolons.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=96, show_default=True, help="Of each training; every sample is seen once.")
@click.option("--batch", default=8, show_default=True)
@click.option("--test", default=200, show_default=True, help="Samples that are scored.")
@click.option("--model", default="demo", show_default=True)
@click.option("--workers", default=2, show_default=True, help="Processes, which share the cores evenly.")
@click.option("--budget-minutes", default=300.0, show_default=True, help="Nothing is begun after this.")
@click.option("--no-compress", is_flag=True)
@click.option("--report-only", is_flag=True, help="Draws and writes what the rows say, computes none.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".overtone/models"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path(".overtone/quality"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/quality"), show_default=True)
@click.option("--document", type=click.Path(path_type=Path), default=DOCUMENT, show_default=True)
def main(
    tasks: str,
    methods: str,
    seeds: str,
    steps: int,
    batch: int,
    test: int,
    model: str,
    workers: int,
    budget_minutes: float,
    no_compress: bool,
    report_only: bool,
    cache: Path,
    work: Path,
    out: Path,
    document: Path,
) -> None:
    """Computes the rows that are missing in OUT.jsonl, draws OUT.png and OUT_compress.png, writes the tables into the
    document."""
    setting = Setting(model, cache, work, Sizes(test=test, train=steps * batch), Pace(steps, batch))
    grid = Grid(
        setting,
        out.with_suffix(".jsonl"),
        _known(tasks.split(","), TASKS, "--tasks"),
        [int(seed) for seed in seeds.split(",")],
        _known(methods.split(";"), LABELS, "--methods"),
        compress=not no_compress,
    )
    left = 0 if report_only else fill(grid, workers, budget_minutes, _tell)
    rows = grid.rows()
    if any(row["kind"] == "tuned" for row in rows):
        plot_scores(rows, out.with_suffix(".png"))
        document.write_text(documented(document.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if any(row["kind"] == "compressed" for row in rows):
        plot_compression(rows, out.with_name(f"{out.name}_compress.png"))
    if left:
        _CONSOLE.print(f"{left} rows or more are missing still; the same command goes on with them")


def _known(names: list[str], known: Container[str], option: str) -> list[str]:
    for name in names:
        if name not in known:
            raise click.BadParameter(f"there is no {name!r}", param_hint=option)
    return names


def _tell(row: Row) -> None:
    told = {name: row[name] for name in ("kind", "task", "arm", "seed", "lr", "location_lr", "total") if row[name]}
    numbers = {name: row.get(name) for name in ("score", "exact", "kept", "validation_loss", "run_seconds")}
    shown = {name: f"{value:.3f}" for name, value in numbers.items() if value is not None}
    _CONSOLE.print("  ".join(f"{name} {value}" for name, value in {**told, **shown}.items()))


if __name__ == "__main__":
    main()
