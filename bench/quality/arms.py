"""What is compared: each way of tuning at three budgets, on the queries and values of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overtone.tuning.methods import AnyMethod, make_method

LOCATION_STEPS = 30
"""One turn of LoCA's coefficients and locations, the least there can be; the authors' tenth of all steps would have none."""


@dataclass(frozen=True, slots=True)
class Rate:
    """lr: learning rate; location_lr: LoCA's of its own, for the locations."""

    lr: float
    location_lr: float | None = None


@dataclass(frozen=True)
class Arm:
    """label: one line of a plot, one colour; budget: in words; swept: whether the learning rate of all arms with this label
    is found with this one."""

    label: str
    budget: str
    method: str
    options: Mapping[str, Any] = field(compare=False)
    swept: bool = False

    @property
    def name(self) -> str:
        return f"{self.label} {self.budget}"

    def make(self, rate: Rate, seed: int, projectors: Path) -> AnyMethod:
        """projectors: where PiCa's are kept."""
        options = dict(self.options)
        if self.method == "pica":
            options["projector_folder"] = projectors
        if self.method == "fourierft":  # PEFT draws the locations from a seed of their own
            options["location_seed"] = 777 + seed
        if rate.location_lr is not None:
            options["location_lr"] = rate.location_lr
        return make_method(self.method, **options)


def _of(label: str, method: str, budgets: Mapping[str, Mapping[str, Any]], **always: Any) -> list[Arm]:
    """The middle budget is the one that is swept."""
    middle = list(budgets)[len(budgets) // 2]
    return [Arm(label, text, method, {**options, **always}, text == middle) for text, options in budgets.items()]


_COEFFICIENTS: Mapping[str, Mapping[str, Any]] = {f"n={n}": {"n": n} for n in (250, 1000, 4000)}
LEARNED, FIXED = "LoCA", "LoCA, fixed"

ARMS: Sequence[Arm] = (
    # s = alpha / r = 2 at every rank, so that one learning rate fits all.
    *_of("LoRA", "lora", {f"r={r}": {"r": r, "alpha": 2.0 * r} for r in (1, 8, 16)}),
    *_of("FourierFT", "fourierft", _COEFFICIENTS),
    *_of(LEARNED, "loca", _COEFFICIENTS, location_steps=LOCATION_STEPS),
    *_of(FIXED, "loca", _COEFFICIENTS, learn_locations=False),
    *_of("sDCTFT", "sdctft", _COEFFICIENTS),
    *_of("DCFT", "dcft", {f"d={d} R={r}": {"d": d, "rank": r} for d, r in ((8, 1), (4, 2), (2, 4))}),
    *_of("PiCa", "pica", {f"r={r}": {"rank": r} for r in (16, 64, 192)}),
)

LABELS = tuple(dict.fromkeys(arm.label for arm in ARMS))

LADDERS: Mapping[str, Sequence[float]] = {
    "LoRA": (3e-3, 1e-2, 3e-2),
    "FourierFT": (3e-2, 1e-1, 3e-1),
    LEARNED: (1e-4, 1e-3, 1e-2),
    FIXED: (3e-2, 1e-1, 3e-1),
    "sDCTFT": (3e-2, 1e-1, 3e-1),
    "DCFT": (1e-2, 3e-2, 1e-1),
    "PiCa": (3e-3, 1e-2, 3e-2),
}
"""The learning rates that are tried first, see `bench.quality.rates`. Of LoCA with learned places these are the places'; the
coefficients have the rate of `FIXED`, so that nothing but the places differs."""


def arm(name: str) -> Arm:
    """Raises `KeyError`."""
    return {one.name: one for one in ARMS}[name]


def swept(label: str) -> Arm:
    return next(one for one in ARMS if one.label == label and one.swept)
