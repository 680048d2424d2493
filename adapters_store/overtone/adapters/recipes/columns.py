"""The numbers of many tensors of a file at once, without an object for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from overtone.adapters.safetensors_reader import Limits

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),  # numpy has no such type: widened once it is read
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


class Entry(NamedTuple):
    """A tensor of a file. start: its first byte, from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    def row(self, index: int) -> Entry:
        """Of a matrix."""
        _, columns = self.shape
        return Entry(self.dtype, (columns,), self.start + index * columns * _DTYPES[self.dtype].itemsize)


def header_of(weights: bytes) -> bytes:
    """Length and header of a safetensors file, unchecked; what there is of it if it has none."""
    return weights[: 8 + min(int.from_bytes(weights[:8], "little"), Limits().header_bytes)]


def entries_of(weights: bytes) -> dict[str, Entry]:
    """The tensors by name of a file that has been read before."""
    start = len(header_of(weights))
    tensors = json.loads(weights[8:start])
    tensors.pop("__metadata__", None)
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in tensors.items()
    }


@dataclass(frozen=True, slots=True)
class Column:
    """Vectors of one dtype, one after another. starts: first byte of each; counts: of its numbers; stride: bytes from one to
    the next, None if they are not evenly spaced."""

    dtype: str
    starts: Sequence[int]
    counts: Sequence[int]
    stride: int | None

    def read(self, data: bytes) -> NDArray[Any]:
        """(n,) all numbers in the order of the vectors; bfloat16 as float32."""
        kind = _DTYPES[self.dtype]
        if self.stride is not None:
            shape, strides = (len(self.starts), self.counts[0]), (self.stride, kind.itemsize)
            numbers = np.ndarray(shape, kind, data, self.starts[0], strides).reshape(-1)
        else:
            whole = np.frombuffer(data, np.uint8)
            spans = zip(self.starts, self.counts, strict=True)
            numbers = np.concatenate([whole[start : start + n * kind.itemsize] for start, n in spans]).view(kind)
        return (numbers.astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else numbers


def column_of(entries: Sequence[Entry]) -> Column:
    """Of vectors. Raises ValueError if they have several dtypes."""
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) != 1:
        raise ValueError("the tensors have several dtypes")
    starts, counts = [entry.start for entry in entries], [entry.shape[0] for entry in entries]
    steps = set(np.diff(starts).tolist()) or {0}
    even = len(steps) == 1 and len(set(counts)) == 1
    return Column(dtypes.pop(), starts, counts, steps.pop() if even else None)
