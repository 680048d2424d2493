"""From packed adapters (`overtone.kernels.packed`) to extents: all cores of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels import PackedDeltas, PackedLayout, PackedTerm
from overtone.kernels.gpu.many_placed import Tables, spectral_records
from overtone.kernels.gpu.records import Extent, extent_of


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the record of a term belongs, and how it is made."""

    kind: str
    slot: int
    tables: Tables


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The terms of one shape. numbers: (m,), theirs in the layout; counts: (m,), of their entries."""

    tables: Tables
    numbers: list[int]
    terms: list[PackedTerm]
    counts: NDArray[np.int64]


class ExtentLayout:
    """How the adapters of one packed layout become extents. placed: of each of its terms."""

    def __init__(self, layout: PackedLayout, placed: Sequence[Placed]) -> None:
        self._placed = placed
        by_tables: dict[int, list[int]] = {}
        for term, one in enumerate(placed):
            by_tables.setdefault(id(one.tables), []).append(term)
        self._groups = [
            _Group(placed[terms[0]].tables, terms, [layout.terms[term] for term in terms], layout.counts[terms])
            for terms in by_tables.values()
        ]

    def extent(self, deltas: PackedDeltas, slots: int, dtype: torch.dtype) -> Extent:
        """slots: how many there are; dtype: of the records' values."""
        rows, cols, numbers = (one.numpy() for one in (deltas.patterns.rows, deltas.patterns.cols, deltas.numbers))
        records: dict[int, torch.Tensor] = {}
        for group in self._groups:
            patterns, values = ([getattr(term, name) for term in group.terms] for name in ("pattern", "values"))
            made = spectral_records(
                _joined(rows, patterns, np.int64),
                _joined(cols, patterns, np.int64),
                _joined(numbers, values, np.float64),
                group.counts,
                group.tables,
                dtype,
            )
            records.update(zip(group.numbers, made, strict=True))
        kinds: dict[str, dict[int, torch.Tensor]] = {}
        for term, one in enumerate(self._placed):
            kinds.setdefault(one.kind, {})[one.slot] = records[term]
        return extent_of(slots, kinds)


def _joined(numbers: NDArray[Any], spans: Sequence[slice], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([numbers[span] for span in spans], dtype=dtype, casting="safe")
