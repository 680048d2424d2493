"""LoCA and sDCTFT: the locations of all modules from the file, sorted in one go, duplicates found.

The slow twins are `families.loca`, `families.sdctft` and `overtone.kernels.sparse_core`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overtone.adapters.families.loca import HIGHEST
from overtone.adapters.families.sdctft import UNNORMALIZED
from overtone.adapters.recipes.columns import Column, column_of
from overtone.adapters.recipes.plan import Fold, Places, Raw, Source

Ints = NDArray[np.int64]
Gains = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of each module: by what its lowest frequency is multiplied, and by what all others."""
Decode = Callable[[NDArray[Any], Ints], Ints | None]
"""(indices of one axis as stored, the highest frequency for each) -> frequencies, None if an index is out of range."""


def loca(source: Source) -> LocatedPlanner:
    floating = source.parts("spectrum_indices")[0].dtype in ("F64", "F32", "F16", "BF16")
    decode = fractions if floating else integers
    return _planner(source, "spectrum_indices", decode, normalized=True)


def sdctft(source: Source) -> LocatedPlanner:
    normalized = source.config.text("transform", UNNORMALIZED) != UNNORMALIZED
    return _planner(source, "indices", integers, normalized=normalized)


def integers(indices: NDArray[Any], highest: Ints) -> Ints | None:
    wide = indices.astype(np.int64, copy=False)
    return wide if ((wide >= 0) & (wide <= highest)).all() else None


def fractions(indices: NDArray[Any], highest: Ints) -> Ints | None:
    """`families.loca.decode_locations`."""
    t = indices if indices.dtype == np.float64 else indices.astype(np.float32, copy=False)
    if not ((t >= 0) & (t <= 1)).all():  # nor is NaN
        return None
    places: Ints = np.rint(np.minimum(t, t.dtype.type(HIGHEST)) * highest.astype(t.dtype)).astype(np.int64)
    return places


def _planner(source: Source, indices: str, decode: Decode, *, normalized: bool) -> LocatedPlanner:
    if not source.only("spectrum", indices):
        raise ValueError("the adapter has other tensors")
    matrices = source.parts(indices)
    values = column_of(source.parts("spectrum"))
    return LocatedPlanner(
        values=values,
        indices=tuple(column_of([matrix.row(axis) for matrix in matrices]) for axis in range(2)),
        decode=decode,
        scale=source.config.number("scale", 1.0),
        gains=() if normalized else tuple(_gains(sizes) for sizes in zip(*source.shapes, strict=True)),
        sorter=Sorter(values.counts, source.shapes),
    )


def _gains(sizes: Sequence[int]) -> Gains:
    """`families.sdctft.synthesis_gain`"""
    return np.array([1 / (2 * math.sqrt(n)) for n in sizes]), np.array([1 / math.sqrt(2 * n) for n in sizes])


@dataclass(frozen=True, slots=True)
class LocatedPlanner:
    """gains: of rows and columns, none if the coefficients belong to the orthonormal frame."""

    values: Column
    indices: tuple[Column, ...]
    decode: Decode
    scale: float
    gains: tuple[Gains, ...]
    sorter: Sorter

    @property
    def nbytes(self) -> int:
        return self.sorter.nbytes

    def read(self, weights: bytes) -> Raw:
        return tuple(column.read(weights) for column in self.indices)

    def plan(self, raw: Raw) -> tuple[Fold, Places] | None:
        sizes = self.sorter.sizes
        rows, cols = (self.decode(one, size - 1) for one, size in zip(raw, sizes, strict=True))
        if rows is None or cols is None:
            return None
        sources, targets, places = self.sorter.sort(rows, cols)
        factors: list[float | NDArray[np.float64]] = [self.scale]
        if self.gains:
            factors += [
                np.where(k == 0, low.repeat(self.values.counts), high.repeat(self.values.counts))[sources]
                for k, (low, high) in zip((rows, cols), self.gains, strict=True)
            ]
        return Fold(sources, targets, len(places.rows), factors), places


class Sorter:
    """Sorts coordinates of some modules by one number of 63 bits each, which holds module, row, column and position.

    sizes: rows and columns of the plane of each coordinate.
    """

    def __init__(self, counts: Sequence[int], shapes: Sequence[tuple[int, int]]) -> None:
        """counts: of the modules' coordinates; shapes: (p, q) of their planes. Raises ValueError if 63 bits do not do."""
        largest = (len(counts), max(p for p, _ in shapes), max(q for _, q in shapes), sum(counts))
        modules, self._rows, self._cols, self._places = (max(1, (n - 1).bit_length()) for n in largest)
        if modules + self._rows + self._cols + self._places > 63:
            raise ValueError("too many modules, rows, columns and coordinates")
        self._counts = np.array(counts, np.int64)
        self.sizes = tuple(np.repeat(np.array(axis, np.int64), self._counts) for axis in zip(*shapes, strict=True))
        self._wanted = np.minimum(self._counts, [p * q for p, q in shapes])
        self._columns = [q for _, q in shapes]
        module = np.repeat(np.arange(len(counts)), self._counts)
        self._base = (module << (self._rows + self._cols + self._places)) | np.arange(sum(counts))

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + sum(size.nbytes for size in self.sizes)

    def sort(self, rows: Ints, cols: Ints) -> tuple[NDArray[np.intp], NDArray[np.intp] | None, Places]:
        """rows, cols: (n,) within the planes. In the order of the coordinates, equal ones as they come: of each its place in
        the arguments and among those of the result, None if that is the order; and the result's, all unique."""
        keys = self._base + ((rows << self._cols | cols) << self._places)
        keys.sort()
        sources = keys & ((1 << self._places) - 1)
        keys >>= self._places
        new = keys[1:] != keys[:-1]
        targets, counts = None, self._counts
        if not new.all():
            targets = np.concatenate(([0], np.cumsum(new)))
            keys, order, counts = self._filled(keys[np.concatenate(([True], new))])
            targets = order[targets]
        row = (keys >> self._cols) & ((1 << self._rows) - 1)
        col = keys & ((1 << self._cols) - 1)
        return sources, targets, Places(counts, row.astype(np.int32), col.astype(np.int32))

    def _filled(self, keys: Ints) -> tuple[Ints, NDArray[np.intp], Ints]:
        """`families.coefficients.filled` of all modules: sorted keys with those of free locations among them, where each of
        `keys` is then, and how many each module has."""
        found = np.bincount(keys >> (self._rows + self._cols), minlength=len(self._counts))
        stops = np.cumsum(found)
        extra = []
        for module in (found < self._wanted).nonzero()[0].tolist():
            own = keys[stops[module] - found[module] : stops[module]]
            q = self._columns[module]
            flat = ((own >> self._cols) & ((1 << self._rows) - 1)) * q + (own & ((1 << self._cols) - 1))
            free = np.ones(self._wanted[module], bool)
            free[flat[flat < len(free)]] = False
            places = free.nonzero()[0][: self._wanted[module] - found[module]]
            extra.append((module << self._rows | places // q) << self._cols | places % q)
        every = np.concatenate((keys, *extra))
        order = np.argsort(every, kind="stable")  # which merges what is sorted already
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return every[order], inverse[: len(keys)], np.maximum(found, self._wanted)
