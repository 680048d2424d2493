"""Frozen linear layers in the layout that the CPU's matrix units read fastest, with what follows them fused in.

oneDNN chooses the layout, through the operators that torch's own compiler uses: torch.ops.mkldnn._linear_pointwise. On
another device, or for a dtype that the CPU has no instructions for, the same interface stands on `torch.nn.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from overtone.errors import UnsupportedModel
from overtone.models.blocks import by_blocks, interchangeable_sizes

_TYPICAL_TOKENS = 64
"""For how many tokens oneDNN is asked to choose the layout; it serves any number."""


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by `weight` faster than torch does: in float32, and in bfloat16 where the CPU has it."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn or not weight.numel():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class PackedLinear:
    """y = x W^T + b for one linear layer, or for several with the same input one after another: W, b are theirs, stacked.

    x: (..., q); y: (..., p). The layers' weights are held here alone: `weight(i)` unpacks one. Rows of y do not depend on
    each other, but their last bits may depend on how many there are. blocks: they do not, in the plain product; the fused
    ones are not for it. Raises `UnsupportedModel` if the machine cannot.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], *, blocks: bool = False
    ) -> None:
        ends = list(accumulate(len(weight) for weight in weights))
        self.bounds = list(zip([0, *ends], ends, strict=False))
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self.packed = packable(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_TOKENS) if self.packed else weight
        )
        self.bias = _stacked(weights, biases)
        self.blocks = blocks
        self._sizes = self._block_sizes(weight) if blocks else ()

    def weight(self, index: int = 0) -> torch.Tensor:
        """(p, q) of one of the layers, in plain layout."""
        start, stop = self.bounds[index]
        return (self._weight.to_dense() if self.packed else self._weight)[start:stop]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.blocks:
            return by_blocks(self._product, x.reshape(-1, x.shape[-1]), sizes=self._sizes).view(
                *x.shape[:-1], self.bounds[-1][1]
            )
        return self._product(x)

    def _block_sizes(self, weight: torch.Tensor) -> tuple[int, ...]:
        row = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        sizes = interchangeable_sizes(self._product, row)
        if not sizes:
            raise UnsupportedModel(
                f"a product by a weight of {tuple(weight.shape)} depends on the row's place on this machine",
                field="deterministic",
            )
        return sizes

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return F.linear(x, self._weight, self.bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return y

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x W^T + b + other, rounded once. other: (..., p)."""
        if not self.packed:
            return F.linear(x, self._weight, self.bias) + other
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self.bias, "add")
        return y

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(x W^T + b) * other. other: (..., p)."""
        if not self.packed:
            return F.linear(x, self._weight, self.bias) * other
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self.bias, "mul")
        return y

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x W^T + b)."""
        if not self.packed:
            return F.silu(F.linear(x, self._weight, self.bias))
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "swish", [], "")
        return y


def _stacked(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])
