"""The error against the bytes, for other budgets than the one that was asked for: from the histograms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from overtone.tuning.compress.bands import BANDS, shares
from overtone.tuning.compress.choosing import Selection
from overtone.tuning.compress.histogram import energy_left, merged
from overtone.tuning.compress.verdict import random_share

_STEPS_PER_OCTAVE = 2


@dataclass(frozen=True, slots=True)
class Point:
    """coefficients: of all modules; bytes: of both files, but for some digits of their headers; relative_error: of the plain
    values; random_error: of a random delta with as many coefficients in each module."""

    coefficients: int
    bytes: int
    relative_error: float
    random_error: float


def curve_each(chosen: Mapping[str, Selection], each: Mapping[str, int], overhead: int) -> tuple[Point, ...]:
    """With equally many coefficients in every module, or band of one. each: module -> bytes of a coefficient."""
    total = sum(one.energy for one in chosen.values())
    points = []
    for n in _steps(max((h.count * len(one.histograms) for one in chosen.values() for h in one.histograms), default=0)):
        left, counts = 0.0, {}
        for module, one in chosen.items():
            wanted = shares(n) if len(one.histograms) == BANDS else (n,)
            left += sum(energy_left(h, share) for h, share in zip(one.histograms, wanted, strict=True))
            counts[module] = sum(min(share, h.count) for h, share in zip(one.histograms, wanted, strict=True))
        points.append(_point(chosen, counts, each, overhead, left, total))
    return _distinct(points)


def curve_over_all(chosen: Mapping[str, Selection], each: Mapping[str, int], overhead: int) -> tuple[Point, ...]:
    """With the largest of all modules together: whole bins of them, from the bin with the largest on."""
    total = sum(one.energy for one in chosen.values())
    whole = merged(one.histograms[0] for one in chosen.values())
    taken = whole.counts.flip(0).cumsum(0)
    points = []
    for n in _steps(whole.count):
        last = whole.first + whole.counts.numel() - 1 - int((taken < n).sum())
        left, counts = 0.0, {}
        for module, one in chosen.items():
            mine = one.histograms[0]
            start = min(max(0, last - mine.first), mine.counts.numel())
            left += float(mine.energy[:start].sum())
            counts[module] = int(mine.counts[start:].sum())
        points.append(_point(chosen, counts, each, overhead, left, total))
    return _distinct(points)


def by_chance(chosen: Mapping[str, Selection], counts: Mapping[str, int]) -> float:
    """The share of the energy that random deltas of these shapes and energies keep with `counts` coefficients."""
    total = sum(one.energy for one in chosen.values())
    return sum(one.energy * random_share(counts[m], one.cells) for m, one in chosen.items()) / total if total else 0.0


def _point(
    chosen: Mapping[str, Selection],
    counts: Mapping[str, int],
    each: Mapping[str, int],
    overhead: int,
    left: float,
    total: float,
) -> Point:
    size = overhead + sum(each[module] * n for module, n in counts.items())
    random_error = math.sqrt(max(0.0, 1 - by_chance(chosen, counts)))
    return Point(sum(counts.values()), size, math.sqrt(max(0.0, left) / total) if total else 0.0, random_error)


def _steps(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, ... to `most`."""
    last, step = 0, 0
    while last < most:
        n = min(most, round(2 ** (step / _STEPS_PER_OCTAVE)))
        if n > last:
            yield n
        last, step = max(last, n), step + 1


def _distinct(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple({point.coefficients: point for point in points}.values())
