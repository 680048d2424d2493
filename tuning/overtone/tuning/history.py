"""What a run writes down while it runs: a row for each step and each evaluation, as JSON lines; at the end a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"
PLOT = "loss.png"
_SMOOTHED = 20


class History:
    """The file in `folder`. Rows are there as soon as they are added."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / HISTORY

    def add(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """A row that a kill cut short is left out."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def cut(self, step: int) -> None:
        """Forgets what came after `step`: a resumed run takes those steps again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        staging = self.path.with_suffix(".writing")
        staging.write_text("".join(kept), encoding="utf-8")
        staging.replace(self.path)


def plot_losses(rows: list[dict[str, Any]], path: Path) -> bool:
    """Loss against steps. False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    learned = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if learned:
        steps, losses = zip(*learned, strict=True)
        axes.plot(steps, losses, color="#bbbbbb", linewidth=0.8, label="step")
        axes.plot(steps, _running_mean(losses), color="#1f5fa8", label=f"mean of {_SMOOTHED} steps")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#c0392b", marker="o", markersize=3, label="evaluation")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per learned token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _running_mean(values: tuple[float, ...]) -> list[float]:
    spans = (values[max(0, end - _SMOOTHED) : end] for end in range(1, len(values) + 1))
    return [sum(span) / len(span) for span in spans]
