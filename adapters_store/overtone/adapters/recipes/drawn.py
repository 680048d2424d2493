"""FourierFT and WaveFT: locations that the configuration tells, so that an adapter brings nothing but numbers.

The slow twin is `families.random_spectrum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from overtone.adapters.families import fourierft as fourierft_family
from overtone.adapters.families import waveft as waveft_family
from overtone.adapters.families.random_spectrum import Spectrum, SpectrumFold, spectrum_fold
from overtone.adapters.recipes.columns import Column, column_of
from overtone.adapters.recipes.plan import Fold, Places, Raw, Source


def fourierft(source: Source) -> DrawnPlanner:
    return _planner(source, fourierft_family.spectrum_of(source.config))


def waveft(source: Source) -> DrawnPlanner:
    return _planner(source, waveft_family.spectrum_of(source.config))


@dataclass(frozen=True, slots=True)
class DrawnPlanner:
    values: Column
    fold: Fold
    places: Places

    @property
    def nbytes(self) -> int:
        return self.fold.nbytes + sum(array.nbytes for array in self.places)

    def read(self, weights: bytes) -> Raw:
        return ()

    def plan(self, raw: Raw) -> tuple[Fold, Places]:
        return self.fold, self.places


def _planner(source: Source, spectrum: Spectrum) -> DrawnPlanner:
    if not source.only(spectrum.part):
        raise ValueError("the adapter has other tensors")
    values = column_of(source.parts(spectrum.part))
    folds = [
        spectrum_fold(spectrum, n, shape, source.context) for n, shape in zip(values.counts, source.shapes, strict=True)
    ]
    rows, cols = (np.concatenate([getattr(fold.pattern, name).numpy() for fold in folds]) for name in ("rows", "cols"))
    counts = np.array([fold.rows.numel() for fold in folds], np.int64)
    return DrawnPlanner(values, _joined(folds, values.counts, spectrum.scale), Places(counts, rows, cols))


def _joined(folds: Sequence[SpectrumFold], counts: Sequence[int], scale: float) -> Fold:
    """The folds of all modules as one."""
    first, entry, sources, targets, weights = 0, 0, [], [], []
    for fold, n in zip(folds, counts, strict=True):
        sources.append(fold.sources.numpy().astype(np.intp) + first)
        targets.append(fold.places.numpy().astype(np.intp) + entry)
        weights.append(fold.weights.numpy())
        first, entry = first + n, entry + fold.rows.numel()
    joined = (np.concatenate(one) for one in (sources, targets, weights))
    return Fold(next(joined), next(joined), entry, [next(joined)], scale)
