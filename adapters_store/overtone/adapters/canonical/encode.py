"""From a parsed adapter to the blobs that the store keeps of it. Equal adapters give equal bytes, in any process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.adapters.canonical.file import FORMAT, write_facts
from overtone.adapters.canonical.layout import DTYPES
from overtone.adapters.canonical.places import needs_wide, write_places
from overtone.adapters.families.types import ParsedAdapter
from overtone.adapters.packs import digest_of
from overtone.adapters.resident import matrices_of
from overtone.adapters.safetensors_writer import PREFIX, Part, pack, part_of
from overtone.adapters.terms import facts_of
from overtone.kernels import SparseCore, SparsePattern, Term, numbers_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Blob(NamedTuple):
    """Bytes and their digest."""

    digest: str
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


def named(data: bytes) -> Blob:
    return Blob(digest_of(data), data)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An adapter's blob, its digest, and by theirs the blobs that it refers to: layout, locations, matrices."""

    digest: str
    blob: bytes
    shared: Mapping[str, bytes]


def encode(adapter: ParsedAdapter) -> Encoded:
    """The matrices among the shared blobs are made into bytes when they are asked for."""
    numbers, locations = _Numbers(), _Locations()
    matrices: dict[str, torch.Tensor] = {}
    modules = {}
    for name in sorted(adapter.deltas):
        delta = adapter.deltas[name]
        for term in delta.terms:
            matrices |= {m.key.removeprefix(PREFIX): m.matrix for m in matrices_of(term) if m.key.startswith(PREFIX)}
        terms = [_facts(term, numbers, locations) for term in delta.terms]
        modules[name] = {"shape": list(delta.shape), "terms": terms}
    return seal(named(layout_blob(adapter, modules)), locations.blob(), numbers.vectors(), matrices)


def layout_blob(adapter: ParsedAdapter, modules: Mapping[str, Any]) -> bytes:
    """Of the facts of all modules."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "family": adapter.family,
        "base_fingerprint": adapter.base_fingerprint,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "parameter_count": adapter.parameter_count,
        "modules": modules,
    }
    if adapter.basis:  # which the tensors do not tell, and the digest must
        facts["basis"] = adapter.basis
    return write_facts(facts, {})


def seal(
    layout: Blob, places: Blob | None, vectors: Mapping[str, NDArray[Any]], matrices: Mapping[str, torch.Tensor]
) -> Encoded:
    """vectors: name -> numbers, bfloat16 as int16; matrices: by digest."""
    facts: dict[str, Any] = {"format": FORMAT, "layout": layout.digest}
    if places is not None:
        facts["places"] = places.digest
    ready = dict(blob for blob in (layout, places) if blob is not None)
    blob = write_facts(facts, {name: Part(DTYPES[name], data.shape, data) for name, data in vectors.items()})
    return Encoded(digest_of(blob), blob, Referred(ready, matrices))


class Referred(Mapping[str, bytes]):
    """Digest -> blob of what an adapter shares with others. A matrix is made into bytes each time that it is asked for."""

    def __init__(self, ready: Mapping[str, bytes], matrices: Mapping[str, torch.Tensor]) -> None:
        self._ready, self._matrices = ready, matrices

    def __getitem__(self, digest: str) -> bytes:
        return self._ready[digest] if digest in self._ready else pack({"matrix": self._matrices[digest]})

    def __iter__(self) -> Iterator[str]:
        yield from self._ready
        yield from self._matrices

    def __len__(self) -> int:
        return len(self._ready) + len(self._matrices)


def _facts(term: Term, numbers: _Numbers, locations: _Locations) -> dict[str, Any]:
    own = numbers_of(term.core) | ({} if term.gain is None else {"gain": term.gain})
    facts = facts_of(term) | {"parts": {name: numbers.add(tensor) for name, tensor in own.items()}}
    if isinstance(term.core, SparseCore):
        facts["pattern"] = locations.add(term.core.pattern)
    return facts


class _Numbers:
    """Tensors one after another in vectors; one that serves many modules, as PiCa's do, is there once."""

    def __init__(self) -> None:
        self._known: dict[int, list[Any]] = {}
        self._found: dict[str, list[NDArray[Any]]] = {}
        self._ends: dict[str, int] = {}

    def add(self, tensor: torch.Tensor) -> list[Any]:
        """Its place: [vector, offset, shape]."""
        if id(tensor) not in self._known:
            dtype, shape, data = part_of(tensor)
            name = _NAMES[dtype]
            self._known[id(tensor)] = [name, self._ends.get(name, 0), list(shape)]
            self._found.setdefault(name, []).append(data.reshape(-1))
            self._ends[name] = self._ends.get(name, 0) + data.size
        return self._known[id(tensor)]

    def vectors(self) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate(found) for name, found in self._found.items()}


class _Locations:
    """Patterns one after another; equal coordinates are there once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], list[int]] = {}
        self._found: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self._shapes: list[tuple[int, int]] = []
        self._end = 0

    def add(self, pattern: SparsePattern) -> list[int]:
        """Its place: [offset, count]."""
        rows, cols = pattern.rows.cpu().numpy(), pattern.cols.cpu().numpy()
        self._shapes.append(pattern.shape)
        key = rows.tobytes(), cols.tobytes()
        if key not in self._known:
            self._known[key] = [self._end, len(rows)]
            self._found.append((rows, cols))
            self._end += len(rows)
        return self._known[key]

    def blob(self) -> Blob | None:
        """None if there are no patterns."""
        if not self._found:
            return None
        rows, cols = (np.concatenate(x) for x in zip(*self._found, strict=True))
        return named(write_places(rows, cols, wide=needs_wide(self._shapes)))
