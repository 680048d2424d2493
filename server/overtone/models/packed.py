"""Frozen linear layers in the layout that the CPU's matrix units read fastest, with what follows them fused in.

In float32 that is the native kernels' layout (`overtone.kernels.native`: 1.1 to 2 times oneDNN's speed at 1 to 512 rows
with AVX2). Without them, and in bfloat16, oneDNN chooses it, through the operators that torch's own compiler uses:
torch.ops.mkldnn._linear_pointwise. On another device, or for a dtype that the CPU has no instructions for, the same
interface stands on `torch.nn.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from overtone.errors import UnsupportedModel
from overtone.kernels.native import NativeKernels
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
    each other, but their last bits may depend on how many there are. blocks: they do not, which native kernels give for
    nothing. native: the kernels compiled for this machine, if there are any; plain: in plain layout whatever the device.
    Raises `UnsupportedModel` if the machine cannot.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        *,
        blocks: bool = False,
        native: NativeKernels | None = None,
        plain: bool = False,
    ) -> None:
        ends = list(accumulate(len(weight) for weight in weights))
        self.bounds = list(zip([0, *ends], ends, strict=False))
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self.bias = _stacked(weights, biases)
        self.blocks = blocks
        self.native = native
        self.plain = plain
        self._form = _Plain(weight) if plain else _form(weight, native)
        by_block = blocks and not isinstance(self._form, _Native)
        self._sizes = self._block_sizes(weight) if by_block else ()

    @property
    def layout(self) -> str:
        """ "native", "oneDNN" or "plain"."""
        return self._form.layout

    def weight(self, index: int = 0) -> torch.Tensor:
        """(p, q) of one of the layers, in plain layout."""
        start, stop = self.bounds[index]
        return self._form.dense()[start:stop]

    def own_weight(self, index: int = 0) -> torch.Tensor:
        """`weight(index)`, the memory itself: what is written there the layer multiplies by from then on. Raises
        `UnsupportedModel` unless the layout is plain."""
        if self.layout != "plain":
            raise UnsupportedModel(f"weights packed for the CPU ({self.layout}) cannot be overwritten", field="model")
        return self.weight(index)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._sizes:
            return by_blocks(self._product, x.reshape(-1, x.shape[-1]), sizes=self._sizes).view(
                *x.shape[:-1], self.bounds[-1][1]
            )
        return self._product(x)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x W^T + b + other, not by blocks. other: (..., p)."""
        return self._form.plus(x, other if self.bias is None else other + self.bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return self._form.product(x, self.bias)

    def _block_sizes(self, weight: torch.Tensor) -> tuple[int, ...]:
        row = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        sizes = interchangeable_sizes(self._product, row)
        if not sizes:
            raise UnsupportedModel(
                f"a product by a weight of {tuple(weight.shape)} depends on the row's place on this machine",
                field="deterministic",
            )
        return sizes


class _Form(Protocol):
    """A weight W in some layout. x: (..., q); y: (..., p)."""

    layout: ClassVar[str]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor: ...

    def dense(self) -> torch.Tensor: ...


def _form(weight: torch.Tensor, native: NativeKernels | None) -> _Form:
    if native is not None and weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.numel():
        return _Native(weight, native)
    return _OneDnn(weight) if packable(weight) else _Plain(weight)


class _Native:
    layout: ClassVar[str] = "native"

    def __init__(self, weight: torch.Tensor, kernels: NativeKernels) -> None:
        self._kernels, self._outputs = kernels, len(weight)
        self._panels = kernels.pack(weight)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self._kernels.product(rows, self._panels, self._outputs, bias).view(*x.shape[:-1], self._outputs)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.product(x, other.reshape(-1, self._outputs))

    def dense(self) -> torch.Tensor:
        return self._kernels.unpack(self._panels, self._outputs)


class _OneDnn:
    layout: ClassVar[str] = "oneDNN"

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_TOKENS)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
        return y

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, None, "add")
        return y

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = self._weight.to_dense()
        return weight


class _Plain:
    layout: ClassVar[str] = "plain"

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight) + other

    def dense(self) -> torch.Tensor:
        return self._weight


def _stacked(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])
