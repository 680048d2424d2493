"""The adapted linear: the one place where adapters meet the model.

`AdaptedLinear` wraps a linear layer once at load. During a forward pass it adds what the pass's `AdapterStep` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from overtone.models.adapter_step import AdapterStep


class StepSlot:
    """Where the runner leaves the current pass's `AdapterStep` for the adapted linears. None: nothing to add."""

    def __init__(self) -> None:
        self.step: AdapterStep | None = None


class AdaptedLinear(nn.Module):
    """A linear layer whose output each request's adapter may change. Without an adapter in the batch it is the layer."""

    def __init__(self, name: str, base: nn.Linear, slot: StepSlot) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self._slot = slot

    @property
    def weight(self) -> torch.Tensor:
        """(p, q): some model definitions read it directly."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        step = self._slot.step
        return y if step is None else step.add(self.name, x, y)


def adaptable_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (p, q) of the linear layers that adapters may change: every one but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def wrap_linears(model: nn.Module, names: Sequence[str], slot: StepSlot) -> None:
    """Replaces each named linear layer by an `AdaptedLinear` around it."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, AdaptedLinear(name, getattr(parent, child), slot))
