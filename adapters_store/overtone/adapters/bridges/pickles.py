"""Files of torch.save, of which nothing but tensors is ever read: the only place in Overtone that reads a pickle at all.

`torch.load` with weights_only has an unpickler of its own that calls no function of the file's choice. What it refuses is
refused here, and so is what it reads but is no plain tensor.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping

import torch

from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, TooLarge

_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    }
)
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)|(\S+) must be imported|Can only|unrecognized")
_MOST_ALIASES = 16
"""How many times the file's own size its tensors may take once none of them shares memory with another."""


def read_pickle(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary that torch.save wrote, as stored, each in memory of its own.

    Raises `InvalidAdapter` for anything else, naming the key, `TooLarge` for a small file that makes many numbers.
    """
    loaded = _load(data, name)
    if not isinstance(loaded, Mapping):
        raise InvalidAdapter(f"{name} holds {type(loaded).__name__}, not a dictionary of tensors", field=name)
    total = 0
    for key, value in loaded.items():
        tensor = _plain(key, value, name)
        total += tensor.numel() * tensor.element_size()
        if total > _MOST_ALIASES * len(data):
            raise TooLarge(f"{name} has {len(data)} bytes but its tensors take more than {total}", field=name)
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in loaded.items()}


def _load(data: bytes, name: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the reader stumble over
        refused = _REFUSED.search(str(error))
        if refused is None:
            message = f"{name} is not a file of tensors that torch can read: {type(error).__name__}"
        else:
            what = f" ({shown(refused[1])})" if refused[1] else ""
            message = f"{name} holds more than tensors{what}, which would run code of its author; it is not converted"
        raise InvalidAdapter(message, field=name) from error


def _plain(key: object, value: object, name: str) -> torch.Tensor:
    """`value`, which must be a tensor that safetensors can hold."""
    if not isinstance(key, str):
        raise InvalidAdapter(f"{name} has the key {shown(key)}, which is no text", field=shown(key))
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        hint = "; convert what is inside it, saved by itself" if isinstance(value, Mapping) else ""
        message = f"{shown(key)} in {name} is {type(value).__name__}, not a tensor{hint}"
        raise InvalidAdapter(message, field=shown(key))
    assert isinstance(value, torch.Tensor)
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
        what = f"{value.dtype}, {value.layout} on {value.device.type}"
        raise InvalidAdapter(f"{shown(key)} in {name} is {what}, which safetensors cannot hold", field=shown(key))
    return value
