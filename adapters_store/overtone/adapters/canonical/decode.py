"""From a stored blob back to the adapter, checked anew: nothing read from disk reaches the kernels on trust."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.file import FORMAT, StoredFile, read_file
from overtone.adapters.canonical.layout import DTYPES, NO_FACTS, Layout
from overtone.adapters.canonical.older import OLDER, SharedPatterns, decode_older
from overtone.adapters.canonical.stored import Sparse, StoredAdapter
from overtone.adapters.safetensors_writer import key_of
from overtone.adapters.terms import TermReader
from overtone.errors import InvalidAdapter
from overtone.kernels import Delta, PackedPatterns, SparsePattern, well_formed
from overtone.kernels.cores import all_finite

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Sharing(SharedPatterns, Protocol):
    """Where an adapter finds what it refers to. What is missing or broken is `StoreCorrupted`."""

    def layout(self, digest: str, base: BaseDescription) -> Layout:
        """Raises what `read_layout` raises."""

    def places(self, digest: str, layout: Layout) -> PackedPatterns:
        """Checked against `layout`. Raises what `read_places` raises."""


def decode(blob: bytes | bytearray | memoryview, base: BaseDescription, sharing: Sharing) -> StoredAdapter:
    """The adapter in a blob, of this format or an older one. Memory that may be written to is not copied.

    Raises `InvalidAdapter` if it is malformed and `BaseModelMismatch` if it does not fit `base`; what `sharing` raises.
    """
    file = read_file(blob)
    try:
        if file.facts["format"] in OLDER:
            return decode_older(bytes(blob), base, sharing)
        return _decode(file, base, sharing)
    except NO_FACTS as error:
        raise InvalidAdapter("the stored adapter lacks what its format demands") from error


def _decode(file: StoredFile, base: BaseDescription, sharing: Sharing) -> StoredAdapter:
    facts = file.facts
    if facts["format"] != FORMAT:
        raise InvalidAdapter(f"the stored adapter has format {facts['format']}, not {FORMAT}; upload it again")
    layout = sharing.layout(_digest(facts["layout"]), base)
    if ("places" in facts) != (layout.places.total > 0):
        raise InvalidAdapter("the stored adapter has locations without sparse cores, or lacks them")
    patterns = sharing.places(_digest(facts["places"]), layout) if "places" in facts else None
    numbers = read_numbers(file, layout)
    if layout.packed is not None:
        assert patterns is not None
        return StoredAdapter(layout.family, Sparse(layout, patterns, numbers["float32"]))
    return StoredAdapter(layout.family, _deltas(layout, _Slices(numbers, patterns), sharing))


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("what the adapter refers to has no such name")
    return value


def read_numbers(file: StoredFile, layout: Layout) -> dict[str, torch.Tensor]:
    """Vector -> (n,), views of the file's memory. Raises `InvalidAdapter` unless they are the layout's, and finite."""
    vectors = file.vectors()
    if vectors.keys() != layout.numbers.keys():
        raise InvalidAdapter("the stored adapter has other vectors than its layout says")
    found = {}
    for name, count in layout.numbers.items():
        dtype, data = vectors[name]
        if dtype != DTYPES[name]:
            raise InvalidAdapter(f"the stored {name} numbers are of another dtype")
        found[name] = torch.from_numpy(data).view(getattr(torch, name))
        if found[name].numel() != count or not all_finite(found[name]):
            raise InvalidAdapter(f"the stored {name} numbers are not as many as the layout says, or not finite")
    return found


class _Slices:
    """The parts of terms as slices of vectors. used: which parts of a term were asked for, by module and index."""

    def __init__(self, numbers: Mapping[str, torch.Tensor], patterns: PackedPatterns | None) -> None:
        self.used: dict[tuple[str, int], set[str]] = {}
        self._numbers, self._all = numbers, patterns
        self._tensors: dict[Any, torch.Tensor] = {}
        self._patterns: dict[Any, SparsePattern] = {}

    def tensor(self, module: str, index: int, facts: Mapping[str, Any], name: str) -> torch.Tensor:
        self.used.setdefault((module, index), set()).add(name)
        vector, offset, shape = facts["parts"][name]
        key = vector, offset, *shape
        if key not in self._tensors:
            self._tensors[key] = self._numbers[vector][offset : offset + math.prod(shape)].view(shape)
        return self._tensors[key]

    def pattern(self, module: str, index: int, facts: Mapping[str, Any], shape: tuple[int, int]) -> SparsePattern:
        assert self._all is not None
        offset, count = facts["pattern"]
        key = offset, count, shape, "keyed" in facts
        if key not in self._patterns:
            rows, cols = (x[offset : offset + count] for x in (self._all.rows, self._all.cols))
            name = key_of(rows=rows, cols=cols) if "keyed" in facts else ""
            self._patterns[key] = SparsePattern(rows, cols, shape, name)
        return self._patterns[key]


def _deltas(layout: Layout, slices: _Slices, sharing: Sharing) -> dict[str, Delta]:
    reader, deltas = TermReader(slices, sharing, well_formed), {}
    for name, terms in layout.modules.items():
        shape = layout.base.shape_of_any(name)
        deltas[name] = Delta(tuple(reader.term(name, i, facts, shape) for i, facts in enumerate(terms)), shape)
        for i, facts in enumerate(terms):
            if slices.used[name, i] != facts["parts"].keys():
                raise InvalidAdapter(f"the stored layout of {name} has parts that no core uses", field=name)
    return deltas
