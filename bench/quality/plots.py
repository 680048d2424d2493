"""What `bench.quality` found, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.quality.arms import FIXED, LABELS
from bench.quality.tables import base_score, compressions, points, tasks_of
from bench.quality.tasks import TASKS
from bench.quality.workbench import Row

_COLOURS = dict(zip(LABELS, ("#4c4c4c", "#c9a227", "#b03030", "#e59a8f", "#2a7fba", "#5a9e4b", "#7b3fa0"), strict=True))
_SIZES = (("trainable_parameters", "trained numbers"), ("bytes", "bytes on disk"))


def plot_scores(rows: Sequence[Row], path: Path) -> None:
    """A column a task; the score against what is trained and against the bytes; bars: standard deviation over seeds."""
    plt, tasks = _pyplot(), tasks_of(rows)
    size = (4.4 * len(tasks) + 0.4, 7.6)
    figure, panels = plt.subplots(2, len(tasks), figsize=size, squeeze=False, sharey="col", layout="constrained")
    for column, task in enumerate(tasks):
        for (key, label), axes in zip(_SIZES, panels[:, column], strict=True):
            _draw(axes, rows, task, key)
            axes.set_xlabel(label)
        panels[0, column].set_title(TASKS[task].title, fontsize=9)
        panels[0, column].set_ylabel("score" if column == 0 else "")
        panels[1, column].set_ylabel("score" if column == 0 else "")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(_title(rows), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axes: Any, rows: Sequence[Row], task: str, key: str) -> None:
    found = points(rows, task)
    for label in LABELS:
        line = sorted((p for p in found if p.label == label), key=lambda p: p.trainable_parameters)
        if line:
            axes.errorbar(
                [getattr(p, key) for p in line],
                [p.score for p in line],
                [p.spread for p in line],
                label=label,
                color=_COLOURS[label],
                marker="o" if label != FIXED else "s",
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
    for shots, style in ((0, "--"), (8, ":")):
        score = base_score(rows, task, shots)
        if score is not None:
            label = f"base, {shots} examples in the prompt" if shots else "base"
            axes.axhline(score, color="black", linestyle=style, linewidth=1, label=label)
    _plain(axes)


def plot_compression(rows: Sequence[Row], path: Path) -> None:
    """Energy kept and score of a LoRA's largest coefficients against their bytes, beside a random delta and chance."""
    plt, tasks = _pyplot(), tasks_of(rows)
    size = (4.4 * len(tasks) + 0.4, 6.6)
    figure, panels = plt.subplots(2, len(tasks), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for (above, below), task in zip(panels.T, tasks, strict=True):
        for kind, label, colour in (("compressed", "trained LoRA", "#2a7fba"), ("random", "random delta", "#b03030")):
            _curve(above, compressions(rows, kind, task), "kept", color=colour, label=label)
        chance = {"color": "#999999", "linestyle": "--", "label": "by chance"}
        _curve(above, compressions(rows, "compressed", task), "random_kept", **chance)
        _curve(below, compressions(rows, "compressed", task), "score", color="#2a7fba", label="compressed")
        lora = [p for p in points(rows, task) if (p.label, p.budget) == ("LoRA", "r=8")]
        for point in lora:
            below.plot([point.bytes], [point.score], "*", color="#4c4c4c", markersize=10, label="LoRA r=8 itself")
        base = base_score(rows, task, 0)
        if base is not None:
            below.axhline(base, color="black", linestyle="--", linewidth=1, label="base")
        above.set_title(TASKS[task].title, fontsize=9)
        above.set_ylabel("share of the energy")
        below.set_ylabel("score")
        below.set_xlabel("bytes on disk")
        for axes in (above, below):
            _plain(axes)
            axes.legend(frameon=False, fontsize=7)
    figure.suptitle("LoRA r=8 as DCT coefficients", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axes: Any, sizes: Sequence[Sequence[Row]], key: str, **style: Any) -> None:
    if sizes:
        bytes_ = [mean(row["bytes"] for row in some) for some in sizes]
        axes.plot(bytes_, [mean(row[key] for row in some) for some in sizes], marker="o", markersize=4, **style)


def _plain(axes: Any) -> None:
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _title(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if row["kind"] == "tuned")
    seeds = len({one["seed"] for one in rows if one["kind"] == "tuned"})
    return f"{row['model']} model, q and v, {row['steps']} steps of {row['batch']} samples, {seeds} seeds"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
