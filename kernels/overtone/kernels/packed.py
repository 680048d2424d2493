"""Adapters of sparse cores as a few long buffers: all values of all modules one after another, all coordinates likewise.

What adapters of one recipe have in common is a `PackedLayout`, what those with the same locations have in common
`PackedPatterns`. An adapter of its own is then one tensor; the core of a module is made when it is asked for, of views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels.compose import PreparedTerm, ResidentDelta
from overtone.kernels.sparse import CsrCore, CsrPattern
from overtone.kernels.types import Frame

_OVERHEAD = 2048
"""Bytes that Python and torch take for an adapter beside its buffers: 1300 measured, 2100 with its own locations."""
_TERM_BYTES = 640
"""Bytes of a term in a layout: 420 measured, and what it is found by."""


@dataclass(frozen=True, slots=True)
class PackedTerm:
    """S^T K A with K[rows[pattern], cols[pattern]] = values[values]. shape: (p, q) of K; both slices have a start, a stop,
    no step and one length. Between frames without a shared matrix, without a gain."""

    analysis: Frame
    synthesis: Frame
    shape: tuple[int, int]
    pattern: slice
    values: slice


class PackedLayout:
    """Where the cores of an adapter lie in its buffers: one object for all adapters of a recipe, equal to itself alone.

    terms: of all modules in order; pattern_starts, value_starts, counts: of each term, int64; pattern_entries: how many
    locations there are at least; entries: how many values. Raises AssertionError for what is no layout.
    """

    __slots__ = (
        "__weakref__",
        "counts",
        "entries",
        "modules",
        "pattern_entries",
        "pattern_starts",
        "terms",
        "value_starts",
    )

    def __init__(self, modules: Mapping[str, tuple[PackedTerm, ...]]) -> None:
        self.modules = dict(modules)
        self.terms = tuple(term for terms in self.modules.values() for term in terms)
        patterns, values = (
            np.array([(one.start, one.stop) for one in spans], dtype=np.int64).reshape(-1, 2)
            for spans in ([term.pattern for term in self.terms], [term.values for term in self.terms])
        )
        assert all(term.pattern.step is None and term.values.step is None for term in self.terms)
        assert all(term.analysis.shared is None and term.synthesis.shared is None for term in self.terms)
        self.counts: NDArray[np.int64] = values[:, 1] - values[:, 0]
        self.pattern_starts, self.value_starts = patterns[:, 0].copy(), values[:, 0].copy()
        assert (self.counts >= 0).all()
        assert (self.counts == patterns[:, 1] - patterns[:, 0]).all()
        assert (self.pattern_starts >= 0).all()
        assert (self.value_starts >= 0).all()
        self.pattern_entries = int(patterns[:, 1].max(initial=0))
        self.entries = int(values[:, 1].max(initial=0))

    @property
    def nbytes(self) -> int:
        return _OVERHEAD + _TERM_BYTES * len(self.terms)


class PackedPatterns:
    """Where the cores of an adapter are not zero.

    rows, cols: (m,) int32, contiguous, on the CPU, within each term's shape, in each term's slice unique and sorted by (row,
    col); key: not empty if many adapters share this object.
    """

    __slots__ = ("__weakref__", "_made", "cols", "key", "rows")

    def __init__(self, rows: torch.Tensor, cols: torch.Tensor, key: str = "") -> None:
        assert rows.shape == cols.shape
        assert all(_is_buffer(one, torch.int32) for one in (rows, cols))
        self.rows, self.cols, self.key = rows, cols, key
        # What is made of a shared one is shared as well, while somebody has it.
        self._made: WeakValueDictionary[tuple[object, ...], CsrPattern] | None = WeakValueDictionary() if key else None

    @property
    def nbytes(self) -> int:
        return 8 * self.rows.numel()

    def of(self, term: PackedTerm) -> CsrPattern:
        """Of one term, as views."""
        key = term.pattern.start, term.pattern.stop, term.shape
        found = None if self._made is None else self._made.get(key)
        if found is None:
            found = CsrPattern(self.rows[term.pattern], self.cols[term.pattern], term.shape)
            if self._made is not None:
                self._made[key] = found
        return found


class PackedDeltas(Mapping[str, ResidentDelta]):
    """Module name -> delta, made anew each time that it is asked for, of views of the buffers. Equal to itself alone.

    numbers: (n,) float32, contiguous, on the CPU: the cores' values. The buffers stay where they are as long as this lives.
    """

    __slots__ = ("__weakref__", "layout", "numbers", "patterns")

    def __init__(self, layout: PackedLayout, patterns: PackedPatterns, numbers: torch.Tensor) -> None:
        assert _is_buffer(numbers, torch.float32)
        assert numbers.numel() == layout.entries
        assert patterns.rows.numel() >= layout.pattern_entries
        self.layout, self.patterns, self.numbers = layout, patterns, numbers

    @property
    def nbytes(self) -> int:
        """Of what is its own, Python's objects included."""
        return packed_nbytes(self.numbers.numel(), 0 if self.patterns.key else self.patterns.rows.numel())

    def filled_rows(self) -> NDArray[np.int64]:
        """How many rows of each of the layout's terms are not empty: (terms,)."""
        rows, layout = self.patterns.rows.numpy(), self.layout
        begun = np.zeros(len(rows) + 1, dtype=np.int64)  # rows that begin up to an entry, its own included
        np.cumsum(rows[1:] != rows[:-1], out=begun[1:-1])
        filled = begun[layout.pattern_starts + layout.counts - 1] - begun[layout.pattern_starts] + 1
        return np.where(layout.counts > 0, filled, 0)

    def __getitem__(self, module: str) -> ResidentDelta:
        return ResidentDelta(tuple(map(self._term, self.layout.modules[module])))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.modules)

    def __len__(self) -> int:
        return len(self.layout.modules)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def _term(self, term: PackedTerm) -> PreparedTerm:
        return PreparedTerm(term.analysis, self._core(term), term.synthesis)

    def _core(self, term: PackedTerm) -> CsrCore:
        return CsrCore(self.patterns.of(term), self.numbers[term.values], shared=bool(self.patterns.key))


def packed_sum(weighted: Sequence[tuple[float, Mapping[str, ResidentDelta]]]) -> PackedDeltas | None:
    """sum of w_i delta_i, in the order given; None unless all are packed, in one layout, with the same locations."""
    packed = [(weight, deltas) for weight, deltas in weighted if isinstance(deltas, PackedDeltas)]
    kinds = {(id(one.layout), id(one.patterns)) for _, one in packed}
    if len(packed) < len(weighted) or len(kinds) != 1:
        return None
    weight, first = packed[0]
    numbers = first.numbers * weight
    for weight, other in packed[1:]:
        numbers += other.numbers * weight
    return PackedDeltas(first.layout, first.patterns, numbers)


def packed_nbytes(entries: int, own_locations: int) -> int:
    """`PackedDeltas.nbytes` of an adapter of `entries` values. own_locations: how many it shares with none."""
    return _OVERHEAD + 4 * entries + 8 * own_locations


def _is_buffer(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.ndim == 1 and tensor.is_contiguous() and tensor.device.type == "cpu"
