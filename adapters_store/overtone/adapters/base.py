"""What the store knows of the base model: its name and the shapes of the layers that an adapter may change."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from overtone.adapters.text import shown
from overtone.errors import BaseModelMismatch

_LONGEST_COMPARED = 256
"""difflib is quadratic, and the name that it would compare comes from the adapter's file."""


@dataclass(frozen=True)
class BaseDescription:
    """The frozen model. `modules`: name as in `model.named_modules()` -> (p, q) = (out_features, in_features)."""

    name: str
    fingerprint: str
    modules: Mapping[str, tuple[int, int]]

    def shape(self, module: str) -> tuple[int, int]:
        """(p, q) of a linear layer. Raises `BaseModelMismatch` with the nearest names if the base has none so called."""
        if module in self.modules:
            return self.modules[module]
        near = difflib.get_close_matches(module, self.modules, n=3) if len(module) <= _LONGEST_COMPARED else []
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise BaseModelMismatch(
            f"the base model {self.name} has no linear layer {shown(module)}{hint}",
            field=shown(module),
            metadata={"module": shown(module), "base": self.name},
        )
