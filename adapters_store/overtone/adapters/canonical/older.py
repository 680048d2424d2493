"""Formats 1 and 2, in which one file held facts, numbers and locations: read, never written.

`<module>.<i>.<part>` are the tensors of the module's i-th term: the numbers of its core by field name, `gain`, and `rows`
and `cols` of a sparse core's pattern, unless others share it: then it is a blob of its own, named by its content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.file import METADATA_KEY
from overtone.adapters.canonical.layout import NO_FACTS, check_base, check_shape
from overtone.adapters.canonical.stored import StoredAdapter
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.adapters.terms import Matrices, TermReader, check_facts
from overtone.errors import InvalidAdapter
from overtone.kernels import Delta, SparsePattern, sound

OLDER = (1, 2)
_LIMITS = Limits(header_bytes=32 << 20, tensors=200_000)
"""Wider than for uploads: a module may take more tensors here than there, and these files are our own."""


class SharedPatterns(Matrices, Protocol):
    """Where these formats keep what many adapters share."""

    def pattern(self, key: str, shape: tuple[int, int]) -> SparsePattern:
        """The pattern with this key, checked for a plane of this shape."""


def decode_older(blob: bytes, base: BaseDescription, sharing: SharedPatterns) -> StoredAdapter:
    """Raises `InvalidAdapter` if malformed, `BaseModelMismatch` if it does not fit `base`, and what `sharing` raises."""
    file = read_safetensors(blob, "the stored adapter", _LIMITS)
    try:
        facts = json.loads(file.metadata[METADATA_KEY])
        if facts["format"] == 1:
            facts = _from_format_1(facts)
        check_base(facts, base)
        parts = _NamedParts(file.tensors, sharing)
        reader = TermReader(parts, sharing, sound)
        deltas = {name: _delta(reader, name, facts["modules"][name], base) for name in sorted(facts["modules"])}
        family = str(facts["family"])
    except NO_FACTS as error:
        raise InvalidAdapter("the stored adapter lacks what its format demands") from error
    if file.tensors.keys() - parts.used:
        raise InvalidAdapter("the stored adapter has tensors that belong to no module")
    return StoredAdapter(family, deltas)


def _delta(reader: TermReader, module: str, facts: Mapping[str, Any], base: BaseDescription) -> Delta:
    shape = check_shape(module, facts, base)
    check_facts(module, facts["terms"], embedding=module in base.embeddings)
    return Delta(tuple(reader.term(module, i, term, shape) for i, term in enumerate(facts["terms"])), shape)


class _NamedParts:
    """used: the names that were asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], sharing: SharedPatterns) -> None:
        self.used: set[str] = set()
        self._tensors, self._sharing = tensors, sharing
        self._patterns: dict[tuple[str, tuple[int, int]], SparsePattern] = {}

    def tensor(self, module: str, index: int, facts: Mapping[str, Any], name: str) -> torch.Tensor:
        stored = facts.get("same", {}).get(name, f"{module}.{index}.{name}")
        self.used.add(stored)
        return self._tensors[stored]

    def pattern(self, module: str, index: int, facts: Mapping[str, Any], shape: tuple[int, int]) -> SparsePattern:
        if "pattern" not in facts:
            rows, cols = (self.tensor(module, index, facts, name) for name in ("rows", "cols"))
            return SparsePattern(rows, cols, shape)
        known = facts["pattern"], shape
        if known not in self._patterns:
            self._patterns[known] = self._sharing.pattern(*known)
        return self._patterns[known]


def _from_format_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had one sparse core a module, whose tensors were called `<module>.rows`, `.cols` and `.values`."""

    def term(module: str, old: Mapping[str, Any]) -> dict[str, Any]:
        frames = {side: {"kind": old[side]} for side in ("analysis", "synthesis")}
        same = {part: f"{module}.{part}" for part in ("rows", "cols", "values")}
        return {**frames, "core": "sparse", "shape": old["shape"], "gain": False, "same": same}

    modules = {name: {"shape": old["shape"], "terms": [term(name, old)]} for name, old in facts["modules"].items()}
    return {**facts, "format": 2, "modules": modules}
