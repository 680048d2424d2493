"""Rows, table and plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.quiet import LIMIT
from rich.console import Console
from rich.table import Table

Sample = Mapping[str, float]
Row = dict[str, Any]
SHOWN = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "others_share")
COLOURS = {"overtone": "#7b3fa0", "vllm": "#2a7fba"}


@dataclass(frozen=True)
class Measured:
    """All runs of one cell, in the order of the rounds; `job`: what the client was asked for."""

    label: str
    system: str
    configuration: str
    job: Mapping[str, object]
    samples: Sequence[Sample]


def row(cell: Measured, conditions: Mapping[str, object]) -> Row:
    """Medians over the quiet runs; all samples are kept. `quotable`: every run was quiet."""
    quiet = [sample for sample in cell.samples if sample["others_share"] <= LIMIT]
    used = quiet or cell.samples
    medians = {f"{name}_median": round(statistics.median(s[name] for s in used), 3) for name in SHOWN}
    return {
        "cell": cell.label,
        "system": cell.system,
        "configuration": cell.configuration,
        "quotable": len(quiet) == len(cell.samples),
        "quiet_runs": len(quiet),
        **medians,
        "job": dict(cell.job),
        "samples": [dict(sample) for sample in cell.samples],
        **conditions,
    }


def write_rows(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def show(rows: Sequence[Row]) -> None:
    table = Table("cell", "configuration", *SHOWN, "quotable", title="Medians of the runs")
    for one in rows:
        numbers = (f"{one[f'{name}_median']:.3g}" for name in SHOWN)
        table.add_row(one["cell"], one["configuration"], *numbers, "yes" if one["quotable"] else "NO")
    Console(width=160).print(table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s of the closed-loop cells: bars grouped by cell, and Overtone's ratio to vLLM where both have the cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    closed = [one for one in rows if one["job"]["kind"] == "closed"]
    labels = list(dict.fromkeys(one["cell"] for one in closed))
    if not labels:
        return
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for offset, (system, colour) in enumerate(COLOURS.items()):
        own = [one for one in closed if one["system"] == system]
        places = [labels.index(one["cell"]) + (offset - 0.5) * 0.4 for one in own]
        bars = axes.bar(places, [one["tokens_per_s_median"] for one in own], 0.4, label=system, color=colour)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    ticks = [f"{label}\n{ratio}" for label, ratio in zip(labels, ratios(closed, labels), strict=True)]
    axes.set_xticks(range(len(labels)), ticks, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("generated tokens per second")
    title = f"{closed[0]['cores']} cores of {closed[0]['cpu']}"
    noisy = "" if all(one["quotable"] for one in closed) else " (some runs were not quiet: do not quote)"
    axes.set_title(title + noisy, fontsize=10)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def ratios(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """For each cell "x 1.23": Overtone's tokens/s over vLLM's; "" where one of them lacks the cell."""
    by_cell = {(one["system"], one["cell"]): float(one["tokens_per_s_median"]) for one in rows}
    texts = []
    for label in labels:
        ours, theirs = by_cell.get(("overtone", label)), by_cell.get(("vllm", label))
        texts.append(f"x {ours / theirs:.2f}" if ours and theirs else "")
    return texts
