"""What became of a delta: plain facts, for people and as JSON."""

from __future__ import annotations

import json
import math
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overtone.adapters.failures import operation
from overtone.tuning.compress.curve import Point
from overtone.tuning.compress.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Activation:
    """||(delta_W - stored) X||_F / ||delta_W X||_F on the prompts. plain: with the coefficients of the delta itself; fitted:
    as stored; tokens: how many X has."""

    plain: float
    fitted: float
    tokens: int


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """norm: ||delta_W||_F; kept: share of its energy in the chosen coefficients; random_kept: what as many of a random delta
    would hold (see `verdict`); relative_error: ||delta_W - stored||_F / norm, rounding and refit included; activation:
    None without a refit, or if no prompt reached the layer."""

    name: str
    shape: tuple[int, int]
    coefficients: int
    norm: float
    kept: float
    random_kept: float
    relative_error: float
    verdict: Verdict
    activation: Activation | None


@dataclass(frozen=True, slots=True)
class Report:
    """Of the whole adapter; errors and shares are over all modules together. source: "lora", another family, or "model";
    family, dtype: of what was written; bytes_in, bytes_out: of the source's files and of the adapter's two; left_out: what
    was dropped; curve: other budgets."""

    source: str
    family: str
    dtype: str
    coefficients: int
    bytes_in: int
    bytes_out: int
    kept: float
    random_kept: float
    relative_error: float
    verdict: Verdict
    activation: Activation | None
    modules: tuple[ModuleReport, ...]
    curve: tuple[Point, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One plain sentence."""
        smaller = (
            f"{self.bytes_in / self.bytes_out:.3g} times smaller" if self.bytes_out < self.bytes_in else "NOT smaller"
        )
        return (
            f"this delta {self.verdict}: {self.coefficients} coefficients keep {self.kept:.2%} of its energy, of a random "
            f"delta they would keep {self.random_kept:.2%}; relative error {self.relative_error:.3g}, {smaller} than "
            "the source"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "summary": self.summary}


def relative(error: float, energy: float) -> float:
    """The root of error / energy, of squares; 0 for nothing of nothing."""
    if energy <= 0:
        return 0.0 if error <= 0 else math.inf
    return math.sqrt(max(0.0, error) / energy)


def write_json(report: Report, path: Path) -> None:
    """In one step. Raises `StoreFailed`."""
    with operation("write the report"):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            staging.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(staging, path)  # noqa: PTH105 - atomic, over an earlier report too
        finally:
            staging.unlink(missing_ok=True)
