"""How the energy of a spectrum is spread over the magnitudes of its coefficients: bins of equal relative width, under 0.4 %.

A bin is what float32's exponent and the first eight bits of its fraction tell, so that a larger bin holds larger numbers.
What float32 has hardly any room for (below 5e-41) counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_SHIFT = 15
_BINS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Of the bins from the smallest magnitude that occurs. counts: (m,) int64; energy: (m,) float64, sums of squares."""

    first: int
    counts: torch.Tensor
    energy: torch.Tensor

    @property
    def count(self) -> int:
        """Coefficients that are not zero."""
        return int(self.counts.sum())

    @property
    def total(self) -> float:
        """||D||_F^2"""
        return float(self.energy.sum())


class Tally:
    """A histogram in the making."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._energy = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """values: (k,) float64."""
        bins = values.abs().to(torch.float32).view(torch.int32).bitwise_right_shift_(_SHIFT)
        self._counts += torch.bincount(bins, minlength=_BINS)
        self._energy += torch.bincount(bins, weights=values.square(), minlength=_BINS)

    def include(self, histogram: Histogram) -> None:
        span = slice(histogram.first, histogram.first + histogram.counts.numel())
        self._counts[span] += histogram.counts
        self._energy[span] += histogram.energy

    def done(self) -> Histogram:
        self._counts[0], self._energy[0] = 0, 0
        filled = self._counts.nonzero().flatten()
        if not filled.numel():
            return Histogram(0, self._counts[:0], self._energy[:0])
        span = slice(int(filled[0]), int(filled[-1]) + 1)
        return Histogram(span.start, self._counts[span].clone(), self._energy[span].clone())


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Of all their coefficients together."""
    tally = Tally()
    for one in histograms:
        tally.include(one)
    return tally.done()


def energy_left(histogram: Histogram, n: int) -> float:
    """What the n largest leave of the energy. Within a bin every coefficient counts as its mean."""
    taken = histogram.counts.flip(0).cumsum(0)
    energy = histogram.energy.flip(0)
    if n >= histogram.count:
        return 0.0
    at = int(torch.searchsorted(taken, n, right=True))
    into = n - (int(taken[at - 1]) if at else 0)
    part = into / int(taken[at] - (taken[at - 1] if at else 0))
    return float(energy[at:].sum() - energy[at] * part)


def enough(histogram: Histogram, allowed: float) -> int:
    """A number of largest coefficients that leaves at most the energy `allowed`: the fewest, rounded up to whole bins."""
    smaller = histogram.energy.cumsum(0)
    skipped = int(torch.searchsorted(smaller, allowed, right=True))
    return int(histogram.counts[skipped:].sum())
