"""A million adapters: imported, looked up, served. N for fewer.

    growth    import rate, disk, opening, memory and lookups against the number of adapters
    starts    a server's start with a full and with an empty catalogue
    traffic   requests over all of them, Zipf(1.0) and uniform, against the same requests over one

Usage: python -m bench.million [--count 1000000] [--n 16] [--root FOLDER] [--out bench/results/million]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import click
from bench.facts import append, conditions
from bench.million.fill import fill, write_facts
from bench.million.plots import plot_growth, plot_traffic
from bench.million.starts import measure_starts, summary_of_starts
from bench.million.traffic import Load, measure, summary
from rich.console import Console
from rich.table import Table


@click.command()
@click.option("--count", default=1_000_000, show_default=True)
@click.option("--n", default=16, show_default=True, help="Coefficients a module; q_proj and v_proj are adapted.")
@click.option("--model", default="demo", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Of the traffic; 0: none.")
@click.option("--root", type=click.Path(path_type=Path), help="Keeps the store; unset: a temporary folder.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".overtone/models"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/million"), show_default=True)
def main(count: int, n: int, model: str, rounds: int, root: Path | None, cache: Path, out: Path) -> None:
    """Measures, prints tables, writes OUT_growth, OUT_starts and OUT_traffic, rows and plots."""
    about = {"model": model, "n": n, "count": count, **conditions()}
    with ExitStack() as stack:
        folder = root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        facts = folder / "base.json"
        write_facts(model, cache, facts)
        growth = _kept(fill(folder / "store", facts, count, n), about, out.with_name(f"{out.name}_growth.jsonl"))
        _show("Growth", growth, [key for key in growth[-1] if key not in about])
        plot_growth(growth, out.with_name(f"{out.name}_growth.png"))
        if rounds:
            starts = _kept(
                measure_starts(folder / "store", cache, model, rounds), about, out.with_name(f"{out.name}_starts.jsonl")
            )
            _show(
                "Start of a server (medians)", summary_of_starts(starts), ["store", "registered", "start_s", "rss_mib"]
            )
            rows = measure(folder / "store", cache, model, count, rounds, Load())
            traffic = _kept(rows, about, out.with_name(f"{out.name}_traffic.jsonl"))
            medians = summary([{k: v for k, v in row.items() if k not in about} for row in traffic])
            _show("Traffic (medians of rounds; ratios to one adapter)", medians, list(medians[0]))
            plot_traffic(traffic, out.with_name(f"{out.name}_traffic.png"))


def _kept(rows: Iterable[dict[str, object]], about: dict[str, object], path: Path) -> list[dict[str, object]]:
    """Written as they come: a run that is cut short keeps what it has."""
    path.unlink(missing_ok=True)
    found = []
    for row in rows:
        found.append({**row, **about})
        append(found[-1], path)
    return found


def _show(title: str, rows: list[dict[str, object]], keys: list[str]) -> None:
    table = Table(*keys, title=title)
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in keys))
    Console().print(table)


if __name__ == "__main__":
    main()
