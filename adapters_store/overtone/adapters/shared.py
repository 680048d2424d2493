"""What many adapters use: stored once, named by its content.

A shared blob is a safetensors file; its SHA-256 is the key of the matrix in it, "sha256:<64 hexadecimal digits>".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.known import Known
from overtone.adapters.canonical.layout import Layout
from overtone.adapters.memo import Memo
from overtone.adapters.projectors import BASE_SVD, Projectors
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.adapters.safetensors_writer import PREFIX
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import PackedPatterns, SharedMatrix, SparsePattern, sound_pattern
from overtone.kernels.cores import all_finite

_LIMITS = Limits(tensors=2)
_PATTERN_BYTES = 32 << 20
"""Of patterns that are kept although nothing uses them: on the device an adapter needs them no more once it is loaded, but
the next one to be loaded needs them again, read and checked."""


class BlobReader(Protocol):
    def read(self, digest: str) -> bytes: ...


class SharedBlobs:
    """What is shared, from the blobs on disk; what is in use is in memory once. Thread-safe.

    known: which may be others' as well.
    """

    def __init__(self, blobs: BlobReader, projectors: Projectors, known: Known | None = None) -> None:
        self._blobs = blobs
        self._layouts = known or Known()
        self._projectors = projectors
        self._lock = threading.Lock()
        self._known: WeakValueDictionary[str, SharedMatrix | SparsePattern] = WeakValueDictionary()
        self._patterns = Memo(_PATTERN_BYTES)

    @property
    def nbytes(self) -> int:
        """Of what is kept whether or not it is in use."""
        return self._layouts.nbytes + self._patterns.nbytes

    def layout(self, digest: str, base: BaseDescription) -> Layout:
        """The layout with this digest. Raises `StoreCorrupted`, `InvalidAdapter`, `BaseModelMismatch`."""
        return self._layouts.layout(digest, base, partial(self._blobs.read, digest))

    def places(self, digest: str, layout: Layout) -> PackedPatterns:
        """The locations with this digest, checked against `layout`. Raises `StoreCorrupted`, `InvalidAdapter`."""
        return self._layouts.places(digest, layout, partial(self._blobs.read, digest))

    def matrix(self, key: str, rows: int, digest: str = "") -> SharedMatrix:
        """The matrix with this key. Of the base's singular vectors, the first `rows` of which must have `digest`.

        Raises `StoreCorrupted`, and `BaseModelMismatch` if the singular vectors are not those that the adapter was stored
        with.
        """
        if key.startswith(BASE_SVD):
            module = key.removeprefix(BASE_SVD)
            matrix = self._projectors.get(module, rows)
            if self._projectors.digest(module, rows) != digest:
                raise BaseModelMismatch(
                    f"the singular vectors of {module} are not those that the adapter was stored with; upload it again",
                    field=module,
                )
            return matrix
        found = self._find(key, partial(_matrix, key))
        assert isinstance(found, SharedMatrix)
        return found

    def pattern(self, key: str, shape: tuple[int, int]) -> SparsePattern:
        """The pattern with this key, as older formats have it, checked for a plane of this shape.

        Raises `StoreCorrupted`, and `InvalidAdapter` if it does not fit.
        """

        def make(tensors: Mapping[str, torch.Tensor]) -> SparsePattern:
            pattern = SparsePattern(tensors["rows"], tensors["cols"], shape, key)
            if not sound_pattern(pattern):
                raise InvalidAdapter(f"the stored locations {key} do not fit a plane of {shape}")
            return pattern

        def counted() -> tuple[SparsePattern, torch.Tensor, torch.Tensor]:
            found = self._find(f"{key} {shape}", make)
            assert isinstance(found, SparsePattern)
            return found, found.rows, found.cols

        return self._patterns.get((key, shape), counted)[0]

    def _find(
        self, key: str, make: Callable[[Mapping[str, torch.Tensor]], SharedMatrix | SparsePattern]
    ) -> SharedMatrix | SparsePattern:
        with self._lock:
            found = self._known.get(key)
        if found is not None:
            return found
        digest = key.partition(" ")[0].removeprefix(PREFIX)
        found = make(read_safetensors(self._blobs.read(digest), "a shared blob", _LIMITS).tensors)
        with self._lock:
            return self._known.setdefault(key, found)


def _matrix(key: str, tensors: Mapping[str, torch.Tensor]) -> SharedMatrix:
    """Raises `InvalidAdapter` unless it is one that the kernels may use."""
    matrix = tensors.get("matrix")
    if len(tensors) != 1 or matrix is None or matrix.dtype != torch.float32 or matrix.ndim != 2:
        raise InvalidAdapter("the stored matrix is no matrix of float32 alone", field=key)
    if not all_finite(matrix):
        raise InvalidAdapter("the stored matrix is not finite", field=key)
    return SharedMatrix(key, matrix)
