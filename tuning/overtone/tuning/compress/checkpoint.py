"""The safetensors files of a Hugging Face folder, tensor by tensor: nothing is read that is not asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from overtone.errors import InvalidRequest

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """field: of the request that brought it, for messages. Raises `InvalidRequest` for a folder that is not one."""

    def __init__(self, folder: Path, field: str) -> None:
        self._folder, self._field = folder, field
        self._files = self._listed()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self._files.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """In memory of its own."""
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._refused(f"{self._files[name].name} cannot be read: {error}") from error
        return tensor

    def _listed(self) -> Mapping[str, Path]:
        if (self._folder / _ONE).is_file():
            path = self._folder / _ONE
            try:
                with safe_open(path, framework="pt") as file:
                    return dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise self._refused(f"{_ONE} cannot be read: {error}") from error
        if not (self._folder / _INDEX).is_file():
            raise self._refused(f"{self._folder} has neither {_ONE} nor {_INDEX}")
        return {name: self._shard(file) for name, file in self._weight_map().items()}

    def _weight_map(self) -> dict[str, object]:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            found = index["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refused(f"{_INDEX} is not an index of tensors: {error}") from error
        if not isinstance(found, dict):
            raise self._refused(f"weight_map in {_INDEX} must be an object")
        return found

    def _shard(self, name: object) -> Path:
        if not isinstance(name, str) or Path(name).name != name:
            raise self._refused(f"{_INDEX} names the file {name!r}, which is not beside it")
        path = self._folder / name
        if not path.is_file():
            raise self._refused(f"{name}, which {_INDEX} names, is missing")
        return path

    def _refused(self, why: str) -> InvalidRequest:
        return InvalidRequest(why, field=self._field)
