"""What `bench.million` found, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PANELS = (
    ("import_per_s", "adapters imported a second", None),
    ("disk_mib", "MiB on disk", None),
    ("open_s", "seconds to open the store", 5.0),
    ("rss_mib", "MiB of memory beside caches", 300.0),
    ("lookup_p99_ms", "ms to look an id up, p99", 1.0),
    ("acquire_p50_ms", "ms from the disk to a lease, p50", None),
)
_COLOURS = ("#4c4c4c", "#c9a227", "#7b3fa0", "#8fb8d8", "#2a7fba")


def plot_growth(rows: Sequence[Row], path: Path) -> None:
    """A panel a quantity against the number of adapters; dashed: the limit that the project set itself."""
    plt = _pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes, (key, label, limit) in zip(panels.flat, _PANELS, strict=True):
        points = [(row["adapters"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), marker="o", color="#2a7fba")
        if limit is not None:
            axes.axhline(limit, color="#b03030", linestyle="--", linewidth=1, label=f"limit: {limit:g}")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("log")
        if key == "disk_mib":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.2 * max([limit or 0.0, *(value for _, value in points)]))
        axes.set_xlabel("adapters in the store")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(rows[0]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_traffic(rows: Sequence[Row], path: Path) -> None:
    """Throughput and time to the first token by popularity; bars: medians of the rounds, points: the rounds."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    labels = [arm.replace(" from", "\nfrom").replace(" in ", "\nin ").replace("one ", "one\n") for arm in arms]
    texts = ("generated tokens a second", "ms to the first token, p50", "ms to the first token, p99")
    for axes, key, text in zip(panels, ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms"), texts, strict=True):
        for place, arm in enumerate(arms):
            values = sorted(row[key] for row in rows if row["arm"] == arm)
            axes.bar(place, values[len(values) // 2], 0.7, color=_COLOURS[place])
            axes.plot([place] * len(values), values, "o", color="black", markersize=2.5)
        axes.set_xticks(range(len(arms)), labels, fontsize=7)
        axes.set_ylabel(text)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(rows[0]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(row: Row) -> str:
    return f"{row['model']} model, q and v, n = {row['n']}, {row['cores']} cores of {row['cpu']}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
