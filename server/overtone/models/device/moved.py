"""Adapters that torch's operators apply on the device: as they are on the host, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import torch

from overtone.kernels import SharedMatrix
from overtone.models.channels import AdapterDeltas


class MovedAdapters:
    """Those of the running requests. What a step does not ask for, the next one has to copy again. Matrices that adapters
    share are there once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there: dict[Hashable, AdapterDeltas] = {}
        self._matrices: WeakValueDictionary[str, SharedMatrix] = WeakValueDictionary()

    def of(self, wanted: Mapping[Hashable, AdapterDeltas]) -> Mapping[Hashable, AdapterDeltas]:
        self._there = {
            key: self._there.get(key) or moved_to(deltas, self._device, self._matrices)
            for key, deltas in wanted.items()
        }
        return self._there


def moved_to(
    deltas: AdapterDeltas, device: torch.device, matrices: MutableMapping[str, SharedMatrix] | None = None
) -> AdapterDeltas:
    """The same adapter, all its tensors on `device`. matrices: those that are there already, by key."""
    known: dict[int, tuple[Any, Any]] = {}
    there = {} if matrices is None else matrices
    return {name: _moved(delta, device, known, there) for name, delta in deltas.items()}


def _moved(
    thing: Any, device: torch.device, known: dict[int, tuple[Any, Any]], matrices: MutableMapping[str, SharedMatrix]
) -> Any:
    """`thing` with all tensors in it on `device`; what was one object stays one.

    known: by identity, with the object itself: packed deltas make theirs when they are asked, and the next one would have
    the id of one that is gone.
    """
    if id(thing) in known:
        return known[id(thing)][1]
    found = thing
    if isinstance(thing, torch.Tensor):
        found = thing.to(device)
    elif isinstance(thing, SharedMatrix):
        found = matrices.get(thing.key)
        if found is None or len(found.matrix) < len(thing.matrix):
            found = matrices[thing.key] = SharedMatrix(thing.key, thing.matrix.to(device))
    elif isinstance(thing, tuple):
        found = tuple(_moved(one, device, known, matrices) for one in thing)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {one.name: getattr(thing, one.name) for one in dataclasses.fields(thing) if one.init}
        found = dataclasses.replace(
            thing, **{name: _moved(value, device, known, matrices) for name, value in fields.items()}
        )
    known[id(thing)] = thing, found
    return found
