"""Spectral records of many cores of one shape at once, for adapters whose cores lie in one buffer.

To the last bit what `overtone.kernels.gpu.placing.spectral_core`, their slow twin, makes of each: weights, sorting keys and
rounding are computed for all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels.gpu.placing import hartley_core, weights
from overtone.kernels.gpu.plans import Plan
from overtone.kernels.gpu.records import HEADER, NARROW, aligned

MOST_ENTRIES = 1 << 22
"""Of all cores together; between Fourier frames an entry becomes up to four."""
_PLACE, _LOCAL, _BLOCK = 24, 40, 44
"""Where in a sorting key begin: the place of an entry's column, of its row in a block, and that block. Before: which entry
it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The coordinates of cores of `shape` in the order of the transforms. rows: (p,), cols: (q,) int64, each with its part
    of a sorting key; blocks: of the inverse transform; first_weight: of row 0 and of column 0, beside 1 of all others."""

    shape: tuple[int, int]
    fourier: bool
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    blocks: int
    first_weight: float

    @staticmethod
    def of(forward: Plan, inverse: Plan) -> Tables:
        assert forward.frame == inverse.frame
        k, n = np.arange(inverse.size), np.arange(forward.size)
        block, local = inverse.block_of(k)
        assert inverse.blocks < 1 << 63 - _BLOCK
        return Tables(
            (inverse.size, forward.size),
            forward.frame == "dft",
            (block << _BLOCK) | (local << _LOCAL),
            forward.place(n) << _PLACE,
            inverse.blocks,
            float(weights(inverse, k)[0]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Numbers of all records one after another. starts, lengths: (m,), of each record's own."""

    numbers: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def words(self) -> NDArray[np.int64]:
        return -(-self.lengths * self.numbers.itemsize // 4)


def spectral_records(
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
    tables: Tables,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """A record, int32, for each of m cores. rows, cols, values: (n,), at most `MOST_ENTRIES`, one core after another;
    counts: (m,), how many of them each has; dtype: of the records' values, float32 or float16."""
    if tables.fourier:
        rows, cols, values, counts = _hartley(rows, cols, values, counts, tables.shape)
    ends = np.concatenate((np.zeros(1, dtype=np.int64), counts.cumsum()))
    keys = tables.rows[rows]
    keys |= tables.cols[cols]
    keys |= np.arange(len(keys))
    for begin, end in pairwise(ends.tolist()):
        keys[begin:end].sort()  # no two entries of a core are in one place
    weighted = np.where(rows == 0, values * tables.first_weight, values)
    weighted[cols == 0] *= tables.first_weight
    scales, rounded = _rounded(weighted[keys & ((1 << _PLACE) - 1)], counts, ends, dtype)
    places, local = (keys >> _PLACE).astype(np.uint16), ((keys >> _LOCAL) & 15).astype(np.uint8)
    parts = [_Part(one, ends[:-1], counts) for one in (rounded, places, local)]
    return _joined(counts, scales, [*parts[:2], *_block_ends(keys >> _BLOCK, counts, tables.blocks), parts[2]])


def _hartley(
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
    shape: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """`hartley_core` of each: what it works with fits caches only one by one."""
    lengths = counts.tolist()
    each = (torch.from_numpy(one).split(lengths) for one in (rows, cols, values))
    found = [hartley_core(i, j, numbers, shape) for i, j, numbers in zip(*each, strict=True)]
    out, into, numbers = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return out, into, numbers, np.array([len(one[0]) for one in found])


def _rounded(
    numbers: NDArray[np.float64], counts: NDArray[np.int64], ends: NDArray[np.int64], dtype: torch.dtype
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Each core's scale, and all numbers in the records' dtype."""
    if dtype is torch.float32:
        return np.ones(len(counts)), numbers.astype(np.float32)
    scales, filled = np.full(len(counts), 1e-30), counts > 0
    if len(numbers):
        scales[filled] = np.maximum(np.maximum.reduceat(np.abs(numbers), ends[:-1][filled]), 1e-30)
    numbers /= np.repeat(scales, counts)
    return scales, numbers.astype(np.float16)


def _block_ends(blocks: NDArray[np.int64], counts: NDArray[np.int64], of_plan: int) -> list[_Part]:
    """The low 16 bits of each core's ends, and the high ones of those that have them."""
    many = len(counts)
    blocks += np.repeat(np.arange(many) * of_plan, counts)
    ends = np.zeros((many, of_plan + 1), dtype=np.int64)
    np.cumsum(np.bincount(blocks, minlength=many * of_plan).reshape(many, of_plan), axis=1, out=ends[:, 1:])
    starts, lengths = np.arange(many) * (of_plan + 1), np.full(many, of_plan + 1)
    high = _Part((ends >> 16).astype(np.uint16).ravel(), starts, np.where(counts >= NARROW, lengths, 0))
    return [_Part(ends.astype(np.uint16).ravel(), starts, lengths), high]


def _joined(counts: NDArray[np.int64], scales: NDArray[np.float64], parts: list[_Part]) -> list[torch.Tensor]:
    words = np.stack([np.full(len(counts), HEADER), *(part.words for part in parts)], axis=1)
    lengths = aligned(words.sum(axis=1))
    begins = lengths.cumsum() - lengths
    joined = np.zeros(int(lengths.sum()), dtype=np.int32)
    joined[begins] = counts
    joined[begins + 1] = scales.astype(np.float32).view(np.int32)
    joined[begins + 2] = counts >= NARROW
    octets, part_begins = joined.view(np.uint8), begins[:, None] + words.cumsum(axis=1)
    for part, begin in zip(parts, part_begins.T, strict=False):
        source, size = part.numbers.view(np.uint8), part.numbers.itemsize
        runs = zip((4 * begin).tolist(), (size * part.starts).tolist(), (size * part.lengths).tolist(), strict=True)
        for to, start, length in runs:
            octets[to : to + length] = source[start : start + length]
    return list(torch.from_numpy(joined).split(lengths.tolist()))
