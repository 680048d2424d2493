"""Tensors that many adapters use: stored once, named by their content.

A shared blob is a safetensors file of nothing but the tensors; its SHA-256 is their key, "sha256:<64 hexadecimal digits>".
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from weakref import WeakValueDictionary

import torch

from overtone.adapters.blobs import BlobFolder
from overtone.adapters.memo import Memo
from overtone.adapters.projectors import BASE_SVD, Projectors
from overtone.adapters.resident import matrices_of
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import SharedMatrix, SparseCore, SparsePattern, Term, sound_pattern

PREFIX = "sha256:"
_LIMITS = Limits(tensors=2)
_PATTERN_BYTES = 32 << 20
"""Of patterns that are kept although nothing uses them: on the device an adapter needs them no more once it is loaded, but
the next one to be loaded needs them again, read and checked."""

_DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file. Equal tensors give equal bytes, in any process and with any version of any library.

    Header length (8 bytes, little-endian), header (JSON, padded with spaces to a multiple of 8), then the tensors, wide ones
    first so that all are aligned: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        whole = tensor.detach().cpu().contiguous()
        parts.append((whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy().tobytes())
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def key_of(**tensors: torch.Tensor) -> str:
    """SharedMatrix: key_of(matrix=...); SparsePattern: key_of(rows=..., cols=...)."""
    return PREFIX + hashlib.sha256(pack(tensors)).hexdigest()


def parts_of(term: Term) -> dict[str, dict[str, torch.Tensor]]:
    """Digest -> tensors of what `term` shares with other adapters; the base model's singular vectors are not among them."""
    core, matrices = term.core, matrices_of(term)
    found = {m.key.removeprefix(PREFIX): {"matrix": m.matrix} for m in matrices if m.key.startswith(PREFIX)}
    if isinstance(core, SparseCore) and core.pattern.key:
        found[core.pattern.key.removeprefix(PREFIX)] = {"rows": core.rows, "cols": core.cols}
    return found


class SharedBlobs:
    """Shared tensors from the blobs on disk; those in use are in memory once. Thread-safe."""

    def __init__(self, blobs: BlobFolder, projectors: Projectors) -> None:
        self._blobs = blobs
        self._projectors = projectors
        self._lock = threading.Lock()
        self._known: WeakValueDictionary[str, SharedMatrix | SparsePattern] = WeakValueDictionary()
        self._patterns = Memo(_PATTERN_BYTES)

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
        found = self._find(key, lambda tensors: SharedMatrix(key, tensors["matrix"]))
        assert isinstance(found, SharedMatrix)
        return found

    def pattern(self, key: str, shape: tuple[int, int]) -> SparsePattern:
        """The pattern with this key, checked for a plane of this shape. Raises `InvalidAdapter` if it does not fit."""

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
