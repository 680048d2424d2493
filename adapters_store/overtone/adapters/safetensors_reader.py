"""safetensors from strangers: our own check of the header, then the official reader on bytes in memory (never mmap)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError

from overtone.adapters.files import WEIGHTS_FILE, refuse_pickle
from overtone.adapters.text import read_json_object, shown
from overtone.errors import InvalidAdapter

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**40


@dataclass(frozen=True)
class Limits:
    """What a header may cost before anything is allocated for the tensors."""

    header_bytes: int = 1 << 20
    tensors: int = 10_000


@dataclass(frozen=True)
class SafetensorsFile:
    """tensors: as stored, on the CPU, in memory of their own; metadata: the header's `__metadata__`."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


def read_safetensors(data: bytes, name: str = WEIGHTS_FILE, limits: Limits | None = None) -> SafetensorsFile:
    """The tensors and the metadata of a safetensors file. Raises `InvalidAdapter` for any bytes that are not one."""
    metadata = _check_header(data, name, limits or Limits())
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise InvalidAdapter(f"{name} is not a valid safetensors file: {shown(str(error))}", field=name) from error
    return SafetensorsFile(tensors, metadata)


def _check_header(data: bytes, name: str, limits: Limits) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    problem = None
    if len(data) < 8:
        problem = f"it has {len(data)} bytes, fewer than the 8 of the header's length"
    elif length > limits.header_bytes:
        problem = f"its header claims {length} bytes, more than the {limits.header_bytes} allowed"
    elif 8 + length > len(data):
        problem = f"its header claims {length} bytes, but the file ends after {len(data) - 8}"
    elif data[8:9] != b"{" or length == 0:
        problem = "its header does not begin with '{'"
    if problem is not None:
        refuse_pickle(name, data)
        raise InvalidAdapter(f"{name} is not a valid safetensors file: {problem}", field=name)
    header = read_json_object(data[8 : 8 + length], f"the header of {name}")
    metadata = _metadata(header.pop("__metadata__", {}), name)
    if len(header) > limits.tensors:
        raise InvalidAdapter(f"{name} has {len(header)} tensors, more than the {limits.tensors} allowed", field=name)
    for tensor, entry in header.items():
        _check_entry(name, shown(tensor), entry)
    return metadata


def _metadata(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidAdapter(f"the __metadata__ of {name} must map text to text", field="__metadata__")
    return value


def _check_entry(name: str, tensor: str, entry: object) -> None:
    """Size arithmetic in unbounded integers, so that no product of a header's numbers overflows later."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter(f"tensor {tensor} of {name} needs dtype, shape and data_offsets only", field=tensor)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        allowed = ", ".join(_ITEM_BYTES)
        raise InvalidAdapter(f"tensor {tensor} of {name} has dtype {shown(dtype)}, not one of {allowed}", field=tensor)
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(max(d, 1) for d in shape) > _MAX_ELEMENTS:
        raise InvalidAdapter(f"tensor {tensor} of {name} has the impossible shape {shown(shape)}", field=tensor)
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        message = f"tensor {tensor} of {name} needs {size} bytes, but its data_offsets are {shown(offsets)}"
        raise InvalidAdapter(message, field=tensor)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
