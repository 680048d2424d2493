"""A stored adapter in memory, as it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from overtone.adapters.canonical.layout import Layout
from overtone.adapters.safetensors_writer import key_of
from overtone.kernels import (
    Delta,
    PackedDeltas,
    PackedLayout,
    PackedPatterns,
    PackedTerm,
    SparseCore,
    SparsePattern,
    Term,
    packed_nbytes,
)


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """An adapter of sparse cores alone. patterns: of all adapters with these locations; values: (n,) float32 of its own."""

    layout: Layout
    patterns: PackedPatterns
    values: torch.Tensor

    @property
    def packed(self) -> PackedDeltas:
        """As the kernels apply it, sharing all memory."""
        return PackedDeltas(self._packed_layout, self.patterns, self.values)

    @property
    def nbytes(self) -> int:
        """In memory, with its locations unless they are many adapters' by nature, as those drawn from a seed."""
        return packed_nbytes(self.values.numel(), 0 if self.layout.keyed else self.patterns.rows.numel())

    @property
    def deltas(self) -> dict[str, Delta]:
        """One by one, sharing the values' memory."""
        cores = _Cores(self)
        return {
            name: Delta(tuple(Term(t.analysis, cores.of(t), t.synthesis) for t in terms), base_shape)
            for name, terms in self._packed_layout.modules.items()
            for base_shape in (self.layout.base.shape_of_any(name),)
        }

    @property
    def _packed_layout(self) -> PackedLayout:
        assert self.layout.packed is not None
        return self.layout.packed


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A decoded blob."""

    family: str
    contents: Sparse | Mapping[str, Delta]

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """Module -> what is added to its weight."""
        return self.contents.deltas if isinstance(self.contents, Sparse) else self.contents


class _Cores:
    """The cores of an adapter: one object for all terms that have the same."""

    def __init__(self, adapter: Sparse) -> None:
        self._adapter = adapter
        self._patterns: dict[tuple[int, int, tuple[int, int]], SparsePattern] = {}
        self._cores: dict[tuple[int, int, tuple[int, int]], SparseCore] = {}

    def of(self, term: PackedTerm) -> SparseCore:
        key = term.pattern.start, term.values.start, term.shape
        found = self._cores.get(key)
        if found is None:
            found = self._cores[key] = SparseCore(self._pattern(term), self._adapter.values[term.values])
        return found

    def _pattern(self, term: PackedTerm) -> SparsePattern:
        name = term.pattern.start, term.pattern.stop, term.shape
        found = self._patterns.get(name)
        if found is None:
            rows, cols = (x[term.pattern] for x in (self._adapter.patterns.rows, self._adapter.patterns.cols))
            key = key_of(rows=rows, cols=cols) if self._adapter.layout.keyed else ""
            found = self._patterns[name] = SparsePattern(rows, cols, term.shape, key)
        return found
