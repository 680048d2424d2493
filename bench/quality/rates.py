"""Which learning rates are tried, and which is taken: the one with the least loss on the validation part.

A ladder of three first; while the best is at an end, one more beyond it, twice at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from bench.quality.arms import LADDERS, LEARNED, Rate

FURTHER = 2

Tried: TypeAlias = Mapping[float, float | None]
"""Rate -> validation loss; None: not finite."""


def rates_to_try(label: str, tried: Tried, lr: float | None = None) -> list[Rate]:
    """All that are to be tried as far as is known yet, those that were included. lr: of LoCA's coefficients, if it is the
    locations' rate that is looked for."""
    return [_rate(label, one, lr) for one in _ladder(label, tried)]


def best_rate(label: str, tried: Tried, lr: float | None = None) -> Rate:
    """Raises `LookupError` before all have been tried."""
    wanted = _ladder(label, tried)
    untried = [one for one in wanted if one not in tried]
    if untried:
        raise LookupError(f"the learning rate {untried[0]:g} of {label} has not been tried yet")
    return _rate(label, min(wanted, key=lambda one: _or_infinity(tried[one])), lr)


def _ladder(label: str, tried: Tried) -> list[float]:
    rungs = list(LADDERS[label])
    for _ in range(FURTHER):
        if any(one not in tried for one in rungs):
            break
        best = min(rungs, key=lambda one: _or_infinity(tried[one]))
        if best == rungs[0]:
            rungs.insert(0, float(f"{rungs[0] ** 2 / rungs[1]:.1g}"))
        elif best == rungs[-1]:
            rungs.append(float(f"{rungs[-1] ** 2 / rungs[-2]:.1g}"))
    return rungs


def _rate(label: str, value: float, lr: float | None) -> Rate:
    if label != LEARNED:
        return Rate(value)
    assert lr is not None
    return Rate(lr, value)


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss
