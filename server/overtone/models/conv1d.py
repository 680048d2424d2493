"""GPT-2 keeps its linear layers as `Conv1D`, with the weight turned round. Made linear at load, they are like all others."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linearise(model: nn.Module) -> frozenset[str]:
    """Replaces each Conv1D, y = x W + b with W (q, p), by the linear layer y = x (W^T)^T + b; returns their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _linear(layer))
    return frozenset(found) | _quantised(model)


def _quantised(model: nn.Module) -> frozenset[str]:
    """Quantised, transformers' Conv1D is a linear layer already that remembers what it was."""
    return frozenset(n for n, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D)


def _linear(layer: Conv1D) -> nn.Linear:
    q, p = layer.weight.shape
    with torch.device("meta"):  # its own weights would be drawn at random only to be replaced
        linear = nn.Linear(q, p)
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear.train(layer.training)
