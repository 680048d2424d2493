"""The settings that `bench.gpu` measures, and their rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.roofline import LLAMA_3_8B, QV, Assumptions, Family, share
from bench.steps.setting import Setting

from overtone.engine.scheduler import StepPlan

Row = dict[str, object]
_DISTINCT = (1, 8, 64, 256)
_MIXED = 64
"""The batch in which one row alone has an adapter, too."""


@dataclass(eq=False)
class Cell:
    """One setting. adapted: rows with an adapter, None: all; merged: into the weights. gpu, step: seconds, of each round;
    over: times the base's, less 1."""

    phase: str
    label: str
    rows: int
    family: Family | None = None
    distinct: int = 0
    adapted: int | None = None
    merged: bool = False
    gpu: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    over: list[float] = field(default_factory=list)

    def plan(self, setting: Setting) -> StepPlan:
        family = None if self.merged else self.family
        if self.phase == "prompt":
            return setting.prompt(family, max(1, self.distinct))
        return setting.decode(self.rows, family, max(1, self.distinct), self.adapted)

    def predicted(self, setting: Setting) -> float | None:
        """Of the model of `LLAMA_3_8B`, where all rows have an adapter."""
        known = setting.base.num_layers == LLAMA_3_8B.layers
        if not known or self.family is None or self.merged or self.adapted is not None:
            return None
        past = setting.sizes.past if self.phase == "decode" else 0
        return round(share(LLAMA_3_8B, self.family, self.rows, self.distinct, Assumptions(), past), 4)

    def row(self, setting: Setting) -> Row:
        family = self.family
        return {
            "phase": self.phase, "label": self.label, "rows": self.rows, "distinct": self.distinct,
            "adapted": 0 if family is None else self.rows if self.adapted is None else self.adapted,
            "family": None if family is None else family.kind, "size": family.size if family else 0,
            "merged": self.merged, "past": setting.sizes.past, "rounds": len(self.step), "gpu_ms": middle(self.gpu),
            "step_ms": middle(self.step), "over_base": middle(self.over, 1),
            "over_base_spread": [round(min(self.over), 4), round(max(self.over), 4)] if self.over else [],
            "predicted": self.predicted(setting),
        }  # fmt: skip


def middle(seconds: Sequence[float], times: float = 1e3) -> float | None:
    return round(statistics.median(seconds) * times, 4) if seconds else None


def decode_cells(rows: int, families: Iterable[Family]) -> list[Cell]:
    """The base model first."""
    found = [Cell("decode", "base", rows)]
    for family in families:
        counts = [one for one in _DISTINCT if one < rows] + [rows]
        found += [Cell("decode", family.name, rows, family, distinct) for distinct in counts]
        if rows == _MIXED:
            found.append(Cell("decode", f"{family.name}; one row", rows, family, 1, adapted=1))
    return found


def prompt_cells(tokens: int, families: Iterable[Family], prompts: int) -> list[Cell]:
    """One prompt with one adapter; as many shorter ones, each with its own. The base model first."""
    families = tuple(families)
    found = [Cell("prompt", "base", tokens, distinct=1)]
    found += [Cell("prompt", family.name, tokens, family, 1) for family in families]
    if prompts > 1:
        found.append(Cell("prompt", "base", tokens, distinct=prompts))
        found += [Cell("prompt", one.name, tokens, one, prompts) for one in families if one.targets != QV]
    return found
