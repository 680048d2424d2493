"""The error against the bytes as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.tuning.compress.report import Report


def write_plot(report: Report, path: Path) -> bool:
    """A PNG. Returns whether there is one: it needs matplotlib, and a curve."""
    if importlib.util.find_spec("matplotlib") is None or not report.curve:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = [point.bytes / 1024 for point in report.curve]
    axes.plot(sizes, [point.relative_error for point in report.curve], label="this delta")
    axes.plot(sizes, [point.random_error for point in report.curve], "--", color="grey", label="a random delta")
    axes.plot(report.bytes_out / 1024, report.relative_error, "o", label="this adapter")
    axes.axvline(report.bytes_in / 1024, color="black", linewidth=0.8, label=f"the source ({report.source})")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05 * max(1.0, report.relative_error))
    axes.set_xlabel("KiB of the adapter")
    axes.set_ylabel("relative error of the delta")
    axes.legend()
    with operation("write the plot"):
        figure.savefig(path, dpi=120)
    return True
