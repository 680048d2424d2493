"""Encoded adapters in memory: read back as the store reads them from disk, taken apart, changed and put together again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load

from overtone.adapters import BaseDescription
from overtone.adapters.canonical import Encoded, Known, StoredAdapter, decode
from overtone.adapters.canonical.file import read_file, write_facts
from overtone.adapters.canonical.layout import Layout
from overtone.adapters.packs import digest_of
from overtone.adapters.safetensors_writer import Part
from overtone.kernels import PackedPatterns, SharedMatrix, SparsePattern
from support.adapters import BASE

_BITS = {2: torch.int16, 4: torch.int32}
_MATRIX = re.compile(r"sha256:([0-9a-f]{64})")
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "I32": np.int32, "U16": np.uint16}


class InMemory:
    """What adapters share, by digest, as the store finds it on disk."""

    def __init__(self, blobs: Mapping[str, bytes]) -> None:
        self._blobs, self._known = blobs, Known()

    def matrix(self, key: str, rows: int, digest: str = "") -> SharedMatrix:
        return SharedMatrix(key, load(self._blobs[key.removeprefix("sha256:")])["matrix"])

    def pattern(self, key: str, shape: tuple[int, int]) -> SparsePattern:
        parts = load(self._blobs[key.removeprefix("sha256:")])
        return SparsePattern(parts["rows"], parts["cols"], shape, key)

    def layout(self, digest: str, base: BaseDescription) -> Layout:
        return self._known.layout(digest, base, lambda: self._blobs[digest])

    def places(self, digest: str, layout: Layout) -> PackedPatterns:
        return self._known.places(digest, layout, lambda: self._blobs[digest])


def whole(encoded: Encoded, base: BaseDescription = BASE) -> StoredAdapter:
    return decode(encoded.blob, base, InMemory(encoded.shared))


@dataclass
class Parts:
    """The three files of an adapter, to be changed. facts: of the blob; places: empty if it has none."""

    facts: dict[str, Any]
    numbers: dict[str, Part]
    layout: dict[str, Any]
    places: dict[str, Part]
    shared: dict[str, bytes]

    def decode(self, base: BaseDescription = BASE) -> StoredAdapter:
        """What is read of them, each named by what it has become."""
        layout, facts, shared = write_facts(self.layout, {}), dict(self.facts), dict(self.shared)
        shared[digest_of(layout)] = layout
        facts["layout"] = digest_of(layout)
        if "places" in facts:
            places = write_facts({}, self.places)
            shared[digest_of(places)] = places
            facts["places"] = digest_of(places)
        return decode(write_facts(facts, self.numbers), base, InMemory(shared))

    @property
    def terms(self) -> list[dict[str, Any]]:
        """The facts of all terms."""
        return [term for module in self.layout["modules"].values() for term in module["terms"]]


def taken_apart(encoded: Encoded) -> Parts:
    main = read_file(encoded.blob)
    layout = read_file(encoded.shared[main.facts["layout"]]).facts
    places = encoded.shared.get(main.facts.get("places"), b"")
    return Parts(main.facts, vectors(encoded.blob), layout, vectors(places) if places else {}, dict(encoded.shared))


def vectors(blob: bytes) -> dict[str, Part]:
    found = read_file(blob).vectors()
    arrays = {name: (dtype, data.view(_NUMPY[dtype]).copy()) for name, (dtype, data) in found.items()}
    return {name: Part(dtype, array.shape, array) for name, (dtype, array) in arrays.items()}


def with_array(part: Part, array: NDArray[Any], dtype: str = "") -> Part:
    """`part` of other numbers."""
    return Part(dtype or part.dtype, array.shape, array)


def facts_in(blob: bytes) -> dict[str, Any]:
    """The one thing that the metadata of a file may be."""
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert list(header["__metadata__"]) == ["overtone"]
    facts: dict[str, Any] = json.loads(header["__metadata__"]["overtone"])
    return facts


def assert_same(got: object, wanted: object) -> None:
    """Equal in every field, tensors to the last bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert torch.equal(*(one.view(_BITS[wanted.element_size()]) for one in (got, wanted)))
    elif is_dataclass(wanted):
        assert type(got) is type(wanted)
        for field in fields(wanted):
            assert_same(getattr(got, field.name), getattr(wanted, field.name))
    elif isinstance(wanted, tuple):
        assert isinstance(got, tuple)
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    else:
        assert got == wanted


def versions_on_disk(root: Path) -> list[str]:
    """The digests of all adapters among the blobs below `root`; whatever else is there, one of them must refer to."""
    files = {path.stem: path.read_bytes() for path in root.rglob("*.safetensors")}
    facts = {digest: read_file(blob).facts for digest, blob in files.items()}
    versions = sorted(digest for digest, found in facts.items() if found is not None and "layout" in found)
    wanted = set(versions)
    for version in versions:
        named = {value for name, value in facts[version].items() if name != "format"}
        wanted |= named | set(_MATRIX.findall(json.dumps(facts[facts[version]["layout"]])))
    assert wanted == files.keys()
    return versions
