"""What the store knows of the base model: its name, and the shapes and weights of the layers that an adapter may change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from overtone.adapters.text import shown
from overtone.errors import BaseModelMismatch

_LONGEST_COMPARED = 256
"""difflib is quadratic, and the name that it would compare comes from the adapter's file."""


def _no_weights(module: str) -> torch.Tensor:
    raise BaseModelMismatch(f"the weights of the base model, which {module} needs, are not at hand", field=module)


@dataclass(frozen=True)
class BaseDescription:
    """The frozen model.

    modules: name as in `model.named_modules()` -> (p, q) = (out_features, in_features) of every linear layer;
    embeddings: name -> (p, q) = (embedding_dim, num_embeddings) of every token embedding, which is a linear layer whose
    inputs are one-hot; weight: name of either -> its weight (p, q), floating point, not to be written to; conv1d: which of
    the modules the checkpoint has turned round, as GPT-2's Conv1D.
    """

    name: str
    fingerprint: str
    modules: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weight: Callable[[str], torch.Tensor] = _no_weights
    conv1d: AbstractSet[str] = frozenset()

    def shape(self, module: str) -> tuple[int, int]:
        """(p, q) of a linear layer. Raises `BaseModelMismatch` with the nearest names if the base has none so called."""
        if module in self.modules:
            return self.modules[module]
        near = difflib.get_close_matches(module, self.modules, n=3) if len(module) <= _LONGEST_COMPARED else []
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        if module in self.embeddings:
            hint = "; it is an embedding, which this family cannot change"
        raise BaseModelMismatch(
            f"the base model {self.name} has no linear layer {shown(module)}{hint}",
            field=shown(module),
            metadata={"module": shown(module), "base": self.name},
        )

    def shape_of_any(self, module: str) -> tuple[int, int]:
        """(p, q) of a linear layer or an embedding."""
        return self.embeddings[module] if module in self.embeddings else self.shape(module)
