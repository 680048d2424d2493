"""What `bench.gpu` found, drawn: cost over the base model against the number of distinct adapters, and of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLOURS = ("#1f6f8b", "#6bb3c9", "#d9a441", "#f0cf8e", "#8c4b6e", "#c490ae", "#4f7a3a", "#a3c28f")

_MARKERS = "osD^vPXh"
"""Hollow and smaller and smaller: lines of the same cost stay to be seen."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """PATH has the decoding steps, PATH's name with _prompt the prompts."""
    import matplotlib

    matplotlib.use("agg")
    known = latest(rows)
    _decoding([row for row in known if row["phase"] == "decode"], path)
    _prompts([row for row in known if row["phase"] == "prompt"], path.with_name(f"{path.stem}_prompt{path.suffix}"))


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of every cell the row that was appended last."""
    keys = ("phase", "label", "rows", "distinct")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _decoding(rows: Sequence[Row], path: Path) -> None:
    """A panel a batch: measured with lines, predicted dotted."""
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["family"] is not None and row["adapted"] == row["rows"]]
    batches = [n for n in sorted({row["rows"] for row in shown}) if n > 1]
    if not batches:
        return
    families = list(dict.fromkeys(row["label"] for row in shown))
    figure, panels = plt.subplots(
        1, len(batches), figsize=(3.8 * len(batches), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        own = [row for row in shown if row["rows"] == batch]
        for at, (label, colour) in enumerate(zip(families, _COLOURS, strict=False)):
            line = sorted((row["distinct"], row["over_base"], row["predicted"]) for row in own if row["label"] == label)
            if line:
                distinct, found, predicted = zip(*line, strict=True)
                percent, mark = [100 * one for one in found], _MARKERS[at]
                axes.plot(
                    distinct, percent, marker=mark, markersize=10 - at, fillstyle="none", color=colour, label=label
                )
                if None not in predicted:
                    axes.plot(distinct, [100 * one for one in predicted], ":", color=colour)
        counts = sorted({row["distinct"] for row in own})
        axes.set(title=f"{batch} rows", xlabel="distinct adapters", xscale="log")
        axes.set_xticks(counts, [str(one) for one in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("over the base model's step, %")
    panels[0][0].set_ylim(0, None)
    figure.suptitle(f"{_title(shown)}, {shown[0]['past']} tokens of past; dotted: predicted", fontsize=10)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _prompts(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot as plt

    if not rows:
        return
    labels = [_prompt_label(row) for row in rows]
    colours = ["#7a7a7a" if row["family"] is None else "#4f7a3a" if row["merged"] else "#1f6f8b" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained")
    bars = axes.barh(range(len(rows)), [row["step_ms"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['step_ms']:.1f} ms ({row['over_base']:+.0%})" for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(f"milliseconds of a step with {rows[0]['rows']} tokens of prompts")
    axes.set_title(_title(rows), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _prompt_label(row: Row) -> str:
    prompts = f"{row['distinct']} prompts" if row["distinct"] > 1 else "1 prompt"
    return f"{row['label']}, {prompts}"


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.get('device', '')}, {first['model']}, {first['dtype']}"
