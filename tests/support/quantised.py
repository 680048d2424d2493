"""Quantised linear layers as libraries make them: a subclass of nn.Linear, and a class of its own with packed buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.tiny import tiny_model

HEADS = ("lm_head", "embed_out")


class ByteLinear(nn.Linear):
    """W_ij = s_i w_ij, w in int8."""

    def __init__(self, base: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias
        self.register_buffer("scale", scale)

    def dense(self) -> torch.Tensor:
        return self.weight.float() * self.scale.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


class NibbleLinear(nn.Module):
    """W_ij = s_i (w_ij - 8), two w of 4 bits in a byte. Its answers are float32, and not contiguous."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = ((base.weight.detach() / scale).round() + 8).to(torch.uint8)
        self.register_buffer("packed", codes[:, ::2] * 16 + codes[:, 1::2])
        self.register_buffer("scale", scale)

    def dense(self) -> torch.Tensor:
        codes = torch.stack((self.packed // 16, self.packed % 16), dim=-1).flatten(1)
        return (codes.float() - 8) * self.scale.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x.float(), self.dense(), self.bias)
        return torch.stack((y, y), dim=-1)[..., 0]


def quantised(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model whose linear layers are quantised in turn, one way and the other; every fifth, and the head, are not."""
    model = tiny_model(kind, **changes)
    linear = [name for name, one in model.named_modules() if type(one) is nn.Linear and name not in HEADS]
    for at, name in enumerate(linear):
        if at % 5 < 4:
            model.set_submodule(name, (ByteLinear, NibbleLinear)[at % 2](model.get_submodule(name)))
    return model.eval().requires_grad_(False)


def dequantised(model: Any) -> Any:
    """A copy with nn.Linear in the place of each quantised layer, of the weight that it has."""
    model = copy.deepcopy(model)
    for name, one in list(model.named_modules()):
        if isinstance(one, ByteLinear | NibbleLinear):
            plain = nn.Linear(one.in_features, one.out_features, bias=one.bias is not None)
            plain.weight, plain.bias = nn.Parameter(one.dense()), one.bias
            model.set_submodule(name, plain)
    return model.eval().requires_grad_(False)
