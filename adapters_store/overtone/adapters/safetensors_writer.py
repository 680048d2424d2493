"""safetensors files whose bytes depend on nothing but what is in them, and the names that bytes get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

PREFIX = "sha256:"
"""Begins the key of what many adapters share; 64 hexadecimal digits follow."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Part(NamedTuple):
    """One tensor of a file. dtype: as safetensors call it; array: contiguous, little-endian, of any shape."""

    dtype: str
    shape: tuple[int, ...]
    array: NDArray[Any]


def assemble(parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file. Equal parts give equal bytes, in any process and with any version of any library.

    Header length (8 bytes, little-endian), header (JSON, padded with spaces to a multiple of 8), then the tensors, wide ones
    first so that all are aligned: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(parts, key=lambda name: (-parts[name].array.itemsize, name))
    end = 0
    for name in names:
        dtype, shape, array = parts[name]
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = _ENCODER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *(parts[name].array.data for name in names)))


def part_of(tensor: torch.Tensor) -> Part:
    """tensor: float32, float16, bfloat16 or int32."""
    whole = tensor.detach().cpu().contiguous()
    array = (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy()
    return Part(_DTYPES[tensor.dtype], tuple(tensor.shape), array)


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """`assemble` of torch's tensors."""
    return assemble({name: part_of(tensor) for name, tensor in tensors.items()}, metadata)


def key_of(**tensors: torch.Tensor) -> str:
    """Of what many adapters share. SharedMatrix: key_of(matrix=...); SparsePattern: key_of(rows=..., cols=...)."""
    return PREFIX + hashlib.sha256(pack(tensors)).hexdigest()
