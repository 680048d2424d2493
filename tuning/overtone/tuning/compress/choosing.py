"""Which coefficients are kept. What is kept and what is dropped is summed as it is met, never as a difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from overtone.errors import InvalidRequest
from overtone.tuning.compress.bands import BANDS, band_masks, shares
from overtone.tuning.compress.histogram import Histogram, Tally, enough, merged
from overtone.tuning.compress.picking import Picked, Picker
from overtone.tuning.compress.source import Source
from overtone.tuning.compress.spectra import Spectrum, blocks

OnModule = Callable[[str, str], None]
"""Told the stage and the module once that is done."""


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """One module's. values: (n,) float64, the coefficients of D; places: (n,) int64, row q + column, ascending; dropped: the
    energy of all others; histograms: of D, one a band."""

    shape: tuple[int, int]
    values: torch.Tensor
    places: torch.Tensor
    dropped: float
    histograms: tuple[Histogram, ...]

    @property
    def kept(self) -> float:
        return float(self.values.square().sum())

    @property
    def energy(self) -> float:
        """||delta_W||_F^2"""
        return self.kept + self.dropped

    @property
    def cells(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def rows(self) -> torch.Tensor:
        return self.places // self.shape[1]

    @property
    def cols(self) -> torch.Tensor:
        return self.places % self.shape[1]


def survey(spectrum: Spectrum) -> Histogram:
    tally = Tally()
    for _, block in blocks(spectrum):
        tally.add(block.flatten())
    return tally.done()


def pick(spectrum: Spectrum, picker: Picker, start: int = 0) -> None:
    """start: the place of the module's first coefficient."""
    for place, block in blocks(spectrum):
        picker.offer(block.flatten(), start + place)


def choose_each(source: Source, n: int, on_module: OnModule) -> dict[str, Selection]:
    """The n largest of every module."""
    chosen = {}
    for module, shape in source.shapes.items():
        spectrum, picker = source.spectrum(module), Picker(n, [shape[0] * shape[1]])
        tally = Tally()
        for place, block in blocks(spectrum):
            numbers = block.flatten()
            tally.add(numbers)
            picker.offer(numbers, place)
        chosen[module] = _selections(picker.done(), [shape], [(tally.done(),)])[0]
        on_module("choosing", module)
    return chosen


def choose_banded(source: Source, n: int, on_module: OnModule) -> dict[str, Selection]:
    """The largest of each band of every module, a third of n each; a band with fewer coefficients gives all it has."""
    chosen = {}
    for module, shape in source.shapes.items():
        pickers = [Picker(share, [shape[0] * shape[1]]) for share in shares(n)]
        tallies = [Tally() for _ in range(BANDS)]
        for place, block in blocks(source.spectrum(module)):
            row = place // shape[1]
            for band, mask in enumerate(band_masks(row, row + block.shape[0], shape)):
                numbers = block.masked_fill(~mask, 0).flatten()
                tallies[band].add(numbers)
                pickers[band].offer(numbers, place)
        chosen[module] = _joined([one.done() for one in pickers], shape, tuple(one.done() for one in tallies))
        on_module("choosing", module)
    return chosen


def choose_over_all(
    source: Source, wanted: Callable[[Mapping[str, Histogram]], int], cut: Callable[[Picked], int], on_module: OnModule
) -> dict[str, Selection]:
    """The largest of all modules together: as many as `cut` says of the `wanted` largest."""
    histograms = {}
    for module in source.shapes:
        histograms[module] = survey(source.spectrum(module))
        on_module("surveying", module)
    if not any(one.count for one in histograms.values()):
        raise InvalidRequest("the source changes nothing: every delta is zero", field="source")
    picker, start = Picker(wanted(histograms), sizes := [p * q for p, q in source.shapes.values()]), 0
    for module, size in zip(source.shapes, sizes, strict=True):
        pick(source.spectrum(module), picker, start)
        start += size
        on_module("choosing", module)
    picked = picker.done()
    found = _selections(picked.first(cut(picked)), list(source.shapes.values()), [(h,) for h in histograms.values()])
    return dict(zip(source.shapes, found, strict=True))


def wanted_for_error(histograms: Mapping[str, Histogram], error: float, dtype: torch.dtype) -> int:
    """Enough coefficients for this relative error, their rounding to `dtype` counted at its worst.

    Raises `InvalidRequest` if rounding alone may be larger.
    """
    unit = torch.finfo(dtype).eps / 2
    if error <= unit:
        name = str(dtype).removeprefix("torch.")
        message = f"error {error:g} is less than what rounding to {name} may cost ({unit:g}): choose another dtype"
        raise InvalidRequest(message, field="error")
    whole = merged(histograms.values())
    return enough(whole, (error * error - unit * unit) * whole.total)


def fewest_for_error(picked: Picked, error: float, dtype: torch.dtype) -> int:
    """The smallest n whose n largest, rounded to `dtype`, are within the relative error.

    With f(n) = sum of squares of all that is left out + of the roundings of what is kept, which never grows with n.
    """
    squares = picked.values.square()
    rounding = (picked.values - picked.values.to(dtype).to(torch.float64)).square()
    nothing = torch.zeros(1, dtype=torch.float64)
    left = torch.cat((squares.flip(0).cumsum(0).flip(0), nothing)) + picked.dropped.sum()
    relative = ((left + torch.cat((nothing, rounding.cumsum(0)))) / (picked.dropped.sum() + squares.sum())).sqrt()
    # A hair below, so that sums in another order keep the promise too.
    met = (relative <= error * (1 - 1e-12)).nonzero()
    if not met.numel():
        name = str(dtype).removeprefix("torch.")
        message = f"no number of coefficients in {name} has the error {error:g}: choose another dtype"
        raise InvalidRequest(message, field="error")
    return int(met[0])


def _selections(
    picked: Picked, shapes: Sequence[tuple[int, int]], histograms: Sequence[tuple[Histogram, ...]]
) -> list[Selection]:
    """One a group."""
    found = []
    for group, (shape, mine) in enumerate(zip(shapes, histograms, strict=True)):
        values, places = picked.of(group)
        found.append(Selection(shape, values, places, float(picked.dropped[group]), mine))
    return found


def _joined(picks: Sequence[Picked], shape: tuple[int, int], histograms: tuple[Histogram, ...]) -> Selection:
    places, order = torch.cat([one.places for one in picks]).sort()
    values = torch.cat([one.values for one in picks])[order]
    return Selection(shape, values, places, sum(float(one.dropped.sum()) for one in picks), histograms)
