"""Where the sparse cores of an adapter are not zero: the coordinates of all patterns one after another, equal ones once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from overtone.adapters.canonical.file import read_file
from overtone.adapters.canonical.spans import tile
from overtone.adapters.safetensors_writer import Part, assemble
from overtone.errors import InvalidAdapter

_WIDEST = 1 << 16
"""Up to here both coordinates fit 16 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """The patterns of a layout, in the order in which they lie. starts, counts: of each; rows, cols: below which its
    coordinates must be; (k,) int64 all. wide: they are stored in 32 bits."""

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    wide: bool

    @property
    def total(self) -> int:
        return int(self.counts.sum())


def needs_wide(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether planes of these shapes have coordinates that need more than 16 bits."""
    return any(max(shape) > _WIDEST for shape in shapes)


def make_spans(patterns: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> Spans:
    """Of ((start, stop), (p, q)) of all sparse cores. Raises ValueError unless the patterns are one after another."""
    within: dict[tuple[int, int], tuple[int, int]] = {}
    for span, (p, q) in patterns:
        known = within.get(span, (p, q))
        within[span] = min(known[0], p), min(known[1], q)
    tile(within)
    facts = np.array([(a, b - a, *within[a, b]) for a, b in sorted(within)], np.int64).reshape(-1, 4)
    starts, counts, rows, cols = facts.T.copy()
    return Spans(starts, counts, rows, cols, needs_wide([shape for _, shape in patterns]))


def write_places(rows: NDArray[np.int32], cols: NDArray[np.int32], *, wide: bool) -> bytes:
    """rows, cols: (n,), of all patterns."""
    numbers = np.int32 if wide else np.uint16
    dtype, shape = "I32" if wide else "U16", rows.shape
    return assemble({name: Part(dtype, shape, x.astype(numbers)) for name, x in (("rows", rows), ("cols", cols))})


def read_places(blob: bytes, spans: Spans) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """rows, cols: (n,). Raises `InvalidAdapter` unless each pattern is sorted by (row, col), unique and in its plane."""
    found = read_file(blob).vectors()
    dtype, numbers = ("I32", np.int32) if spans.wide else ("U16", np.uint16)
    facts = {name: (vector.dtype, len(vector.data)) for name, vector in found.items()}
    if facts != dict.fromkeys(("rows", "cols"), (dtype, spans.total * np.dtype(numbers).itemsize)):
        raise InvalidAdapter("the stored locations are not those of their layout")
    rows, cols = (found[name].data.view(numbers).astype(np.int32) for name in ("rows", "cols"))
    if not _sound(rows, cols, spans):
        raise InvalidAdapter("the stored locations do not fit the planes of their layout")
    return rows, cols


def _sound(rows: NDArray[np.int32], cols: NDArray[np.int32], spans: Spans) -> bool:
    inside = (rows >= 0) & (rows < np.repeat(spans.rows, spans.counts))
    inside &= (cols >= 0) & (cols < np.repeat(spans.cols, spans.counts))
    flat = rows.astype(np.int64) << 32 | cols
    ascending = flat[1:] > flat[:-1]
    ascending[spans.starts[1:] - 1] = True
    return bool(inside.all()) and bool(ascending.all())
