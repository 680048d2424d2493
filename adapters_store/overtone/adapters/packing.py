"""Adapters whose terms are all sparse cores, packed into a few buffers (`overtone.kernels.packed`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch

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
from overtone.kernels.sparse import pattern_key

T = TypeVar("T")
_Layouts: TypeAlias = MutableMapping[tuple[Any, ...], PackedLayout]


@dataclass(frozen=True, slots=True, eq=False)
class PackedParts:
    """What packed adapters have in common, each there once while one of them uses it. layouts: by contents; patterns: by
    key."""

    layouts: _Layouts = field(default_factory=WeakValueDictionary)
    patterns: MutableMapping[str, PackedPatterns] = field(default_factory=WeakValueDictionary)


class _Run(Generic[T]):
    """Things of some length each, one after another, none of them twice."""

    def __init__(self) -> None:
        self.things: list[T] = []
        self.length = 0
        self._spans: dict[Hashable, slice] = {}

    def place(self, identity: Hashable, thing: T, length: int) -> slice:
        span = self._spans.get(identity)
        if span is None:
            span = self._spans[identity] = slice(self.length, self.length + length)
            self.things.append(thing)
            self.length += length
        return span


class _Packing:
    """The layout of one adapter, and what lies in it. A core that serves many modules is there once, a pattern too."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self.cores: _Run[SparseCore] = _Run()
        self.patterns: _Run[SparsePattern] = _Run()
        self.modules = {name: tuple(map(self._term, delta.terms)) for name, delta in deltas.items()}

    def _term(self, term: Term) -> PackedTerm:
        core = term.core
        assert isinstance(core, SparseCore)
        pattern = self.patterns.place(pattern_key(core.pattern) or id(core.pattern), core.pattern, core.nnz)
        return PackedTerm(
            term.analysis, term.synthesis, core.shape, pattern, self.cores.place(id(core), core, core.nnz)
        )

    @property
    def key(self) -> str:
        """Of all patterns together; "" if one of them is not shared."""
        keys = [pattern_key(one) for one in self.patterns.things]
        return "\n".join(keys) if all(keys) else ""

    @property
    def nbytes(self) -> int:
        return packed_nbytes(self.cores.length, 0 if self.key else self.patterns.length)

    def layout(self, parts: PackedParts) -> PackedLayout:
        contents = tuple((name, *map(_facts, terms)) for name, terms in self.modules.items())
        found = parts.layouts.get(contents)
        if found is None:
            found = parts.layouts[contents] = PackedLayout(self.modules)
        return found

    def located(self, parts: PackedParts) -> PackedPatterns:
        found = parts.patterns.get(self.key) if self.key else None
        if found is None:
            things = self.patterns.things
            found = PackedPatterns(
                torch.cat([one.rows for one in things]), torch.cat([one.cols for one in things]), self.key
            )
            if self.key:
                parts.patterns[self.key] = found
        return found


def pack_deltas(deltas: Mapping[str, Delta], parts: PackedParts | None = None) -> PackedDeltas | None:
    """`deltas` on the CPU, packed; None if a term is gained, not sparse, or between frames with a matrix."""
    if not _packable(deltas):
        return None
    parts, packing = parts or PackedParts(), _Packing(deltas)
    numbers = torch.cat([core.values for core in packing.cores.things])
    return PackedDeltas(packing.layout(parts), packing.located(parts), numbers)


def packable_nbytes(deltas: Mapping[str, Delta]) -> int | None:
    """`pack_deltas(...).nbytes`, without packing."""
    return _Packing(deltas).nbytes if _packable(deltas) else None


def _packable(deltas: Mapping[str, Delta]) -> bool:
    terms = [term for delta in deltas.values() for term in delta.terms]
    return bool(terms) and all(
        isinstance(term.core, SparseCore)
        and term.gain is None
        and term.analysis.shared is None
        and term.synthesis.shared is None
        for term in terms
    )


def _facts(term: PackedTerm) -> tuple[Any, ...]:
    spans = term.pattern.start, term.pattern.stop, term.values.start, term.values.stop
    return term.analysis, term.synthesis, term.shape, *spans
