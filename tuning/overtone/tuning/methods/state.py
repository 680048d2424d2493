"""A method's part of a checkpoint: its tensors, and beside them what they are of, so that nothing else is put back."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from overtone.errors import InvalidRequest

_SETTINGS = "settings"
"""A uint8 tensor of JSON: checkpoints hold tensors only."""


def packed(settings: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU. settings: what JSON can hold."""
    text = json.dumps(settings, sort_keys=True).encode()
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return {_SETTINGS: torch.tensor(list(text), dtype=torch.uint8), **state}


def restore(
    settings: Mapping[str, object], tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> None:
    """Writes into `tensors` what `packed` gave. Raises `InvalidRequest`, before anything is written, with the first setting
    that differs or the first tensor that does not fit."""
    _check_settings(settings, state)
    stored = {name: tensor for name, tensor in state.items() if name != _SETTINGS}
    odd = sorted(stored.keys() ^ tensors.keys())
    if odd:
        where = "not in the checkpoint" if odd[0] in tensors else "in the checkpoint only"
        raise InvalidRequest(f"{odd[0]} is {where}: it is of another model", field=odd[0])
    for name, tensor in tensors.items():
        if stored[name].shape != tensor.shape or stored[name].dtype != tensor.dtype:
            message = f"{name} is {_kind(stored[name])} in the checkpoint and {_kind(tensor)} here"
            raise InvalidRequest(message, field=name)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


def _check_settings(settings: Mapping[str, object], state: Mapping[str, torch.Tensor]) -> None:
    here = json.loads(json.dumps(settings))
    try:
        there = json.loads(bytes(state[_SETTINGS].tolist()))
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequest("the checkpoint does not say of which method it is", field=_SETTINGS) from error
    for field in sorted(here.keys() | there.keys(), key=lambda field: (field != "method", field)):
        if here.get(field) != there.get(field):
            message = f"{field} is {there.get(field)!r} in the checkpoint and {here.get(field)!r} here"
            raise InvalidRequest(message, field=field)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
