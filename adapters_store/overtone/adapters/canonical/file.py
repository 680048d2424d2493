"""The store's own safetensors files: what the three kinds of them have in common, and how they are read.

Facts are JSON under one metadata key: with more than one, the order in which a writer puts them would make equal adapters
differ in their bytes. Every tensor is a vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from overtone.adapters.safetensors_writer import Part, assemble
from overtone.errors import InvalidAdapter

FORMAT = 3
METADATA_KEY = "overtone"
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_HEADER_BYTES = 32 << 20
_ITEM_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U16": 2}


class Vector(NamedTuple):
    """dtype: as safetensors call it; data: its bytes."""

    dtype: str
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """facts: of the metadata, unchecked, None if there are none; header: of the tensors, unchecked; data: their bytes, in
    memory that may be written to, where they are aligned as in the file."""

    facts: Any
    header: Mapping[str, Any]
    data: NDArray[np.uint8]

    def vectors(self) -> dict[str, Vector]:
        """All of `data`, each byte once. Raises `InvalidAdapter` if the tensors are other than vectors side by side."""
        try:
            return _vectors(self.header, self.data)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidAdapter("the vectors of a stored file are not side by side") from error


def write_facts(facts: Mapping[str, Any], parts: Mapping[str, Part]) -> bytes:
    """Equal arguments give equal bytes."""
    return assemble(parts, {METADATA_KEY: _ENCODER.encode(facts)})


def read_file(blob: bytes | bytearray | memoryview) -> StoredFile:
    """Raises `InvalidAdapter` for any bytes that are no file of ours."""
    try:
        start = 8 + int.from_bytes(blob[:8], "little")
        if not 8 < start <= min(len(blob), _HEADER_BYTES) or start % 8:
            raise ValueError("the header is not in the file, or the vectors are not aligned")
        header = json.loads(bytes(blob[8:start]))
        metadata = header.pop("__metadata__", None)
        facts = None if metadata is None else json.loads(metadata[METADATA_KEY])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidAdapter("a stored file is not what its format demands") from error
    data = np.frombuffer(blob, np.uint8)[start:]
    return StoredFile(facts, header, data if data.flags.writeable else data.copy())


def _vectors(header: Mapping[str, Any], data: NDArray[np.uint8]) -> dict[str, Vector]:
    found, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (count,), (start, stop), size = entry["shape"], entry["data_offsets"], _ITEM_BYTES[entry["dtype"]]
        if type(count) is not int or count < 0 or stop - start != count * size:
            raise ValueError("a vector is not as long as it says")
        if start != end or start % size:
            raise ValueError("the vectors do not follow each other, or one is not aligned")
        found[name] = Vector(entry["dtype"], data[start:stop])
        end = stop
    if end != len(data):
        raise ValueError("the file is longer than its vectors")
    return found
