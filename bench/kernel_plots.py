"""What `bench.kernels` found, drawn: how near the roofline each operator comes, and its time against the batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_BATCHES = {1: "#cfe0ee", 8: "#8fb8d8", 64: "#3f7fb0", 256: "#174a73", 512: "#e3b45c", 2048: "#b06a1f", 0: "#7a7a7a"}
_LABELS = {512: "prompt of 512", 2048: "prompt of 2048", 0: "a whole matrix"}
_LINES = {
    "ours": ("spectral terms, these kernels", "#1f6f8b", "o", "-"),
    "lora": ("LoRA r=16, these kernels", "#d9a441", "s", "-"),
    "reference": ("spectral terms, plain torch", "#8c4b6e", "^", "-"),
    "roofline": ("roofline of spectral terms", "#555555", "", ":"),
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """PATH has the roofline, PATH's name with _batch the times."""
    import matplotlib

    matplotlib.use("agg")
    timed = latest([row for row in rows if row["ok"]])
    if timed:
        _fractions(timed, path)
        _times(timed, path.with_name(f"{path.stem}_batch{path.suffix}"))


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of every cell the row that was appended last."""
    keys = ("operator", "shape", "rows", "size", "popularity", "adapters", "dtype")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _fractions(rows: Sequence[Row], path: Path) -> None:
    """A group of bars an operator, a bar a batch: the median over its shapes."""
    from matplotlib import pyplot as plt

    found: dict[str, dict[int, float]] = {}
    for operator in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == operator and row["popularity"] in ("distinct", "prompt", "")]
        by_batch = {
            n: [row["fraction"] for row in own if row["rows"] == n] for n in sorted({row["rows"] for row in own})
        }
        found[operator] = {n: statistics.median(parts) for n, parts in by_batch.items()}
    bars = sum(len(each) + 1 for each in found.values())
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.2 * bars), layout="constrained")
    place, ticks = 0.0, {}
    for operator, each in found.items():
        ticks[operator] = place + (len(each) - 1) / 2
        for n, part in each.items():
            axes.barh(place, part, 0.9, color=_BATCHES.get(n, "#999999"))
            axes.text(part + 0.01, place, f"{part:.0%}", va="center", fontsize=8)
            place += 1
        place += 1
    for n in sorted({n for each in found.values() for n in each}):
        label = _LABELS.get(n, "1 row" if n == 1 else f"{n} rows")
        axes.barh([0], [0], color=_BATCHES.get(n, "#999999"), label=label)
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlim(0, max(1.1, *(part + 0.1 for each in found.values() for part in each.values())))
    axes.set_xlabel("roofline time / time taken (median over shapes; distinct adapters)")
    axes.set_title(_title(rows), fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _times(rows: Sequence[Row], path: Path) -> None:
    """A panel a group of layers, distinct adapters."""
    from matplotlib import pyplot as plt

    spectral = [row for row in rows if row["operator"] == "spectral" and row["popularity"] == "distinct"]
    shapes = [shape for shape in dict.fromkeys(row["shape"] for row in spectral) if _batches(spectral, shape) > 1][:4]
    if not shapes:
        return
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    size = min(row["size"] for row in spectral)
    for axes, shape in zip(panels[0], shapes, strict=True):
        own = sorted(
            (row for row in spectral if row["shape"] == shape and row["size"] == size), key=lambda row: int(row["rows"])
        )
        for name, (label, colour, marker, style) in _LINES.items():
            line = [(row["rows"], row[f"{name}_us"]) for row in own if f"{name}_us" in row]
            if line:
                axes.plot(*zip(*line, strict=True), style, marker=marker, markersize=5, color=colour, label=label)
        axes.set(title=shape, xlabel="rows, each its own adapter", xscale="log", yscale="log")
        batches = [row["rows"] for row in own]
        axes.set_xticks(batches, [str(n) for n in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds")
    figure.suptitle(f"{_title(rows)}, n={size}", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _batches(rows: Sequence[Row], shape: str) -> int:
    return len({row["rows"] for row in rows if row["shape"] == shape})


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    ceilings = f"{first['bandwidth'] / 1e12:.2f} TB/s, {first['rate'] / 1e12:.0f} TFLOP/s"
    if not first["ceilings_measured"]:
        ceilings = "ceilings not measured"
    return f"{first.get('device', 'no device')}, {first['dtype']}, {ceilings}"
