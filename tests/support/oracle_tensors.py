"""What the oracles of PEFT's families share: tensors that have to be asked for, PEFT's two rules for patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Config = Mapping[str, Any]
Weights = Mapping[str, torch.Tensor]
"""Module -> its frozen weight (p, q)."""

PREFIX = "base_model.model."


class Tensors:
    """An adapter's tensors, each of which has to be asked for."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self._left = dict(stored)
        self._all = stored

    def modules(self, part: str) -> list[str]:
        """Those with a tensor so called."""
        end = f".{part}"
        return [n.removeprefix(PREFIX).removesuffix(end) for n in self._all if n.startswith(PREFIX) and n.endswith(end)]

    def has(self, name: str) -> bool:
        return name in self._all

    def take(self, module: str, part: str) -> torch.Tensor:
        return self.named(f"{PREFIX}{module}.{part}")

    def named(self, name: str) -> torch.Tensor:
        """As it was saved."""
        self._left.pop(name, None)
        return self._all[name]

    def finish(self) -> None:
        assert not self._left, f"no equation needs {sorted(self._left)}"


def matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`."""
    key = next((k for k in patterns or {} if re.match(rf"(.*\.)?({k})$", module)), module)
    return (patterns or {}).get(key, default)


def matching_after_dot(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The rule that FourierFT and C3A have in its place."""
    key = next((k for k in patterns or {} if re.match(rf".*\.{k}$", module)), module)
    return (patterns or {}).get(key, default)


def check_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in float64."""
    assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} instead of {shape}"
    return tensor.double()
