"""The weight of a layer that keeps it packed: for adapters that depend on it, at their load only.

By the packing's own definition where that is known, bitsandbytes' and transformers' FP8, or where the layer or its weight
offers to `dequantize`; by the layer's answers to unit vectors, W e_j = f(e_j) - b, otherwise. Whichever way, the weight must
agree with what the layer answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from overtone.errors import UnsupportedModel

_CHUNK = 1024
"""How many unit vectors a layer sees at once."""
_ROWS = 4
_NOISE = 0.25
"""Relative difference to the layer's own answers. Layers that also quantise their input, to 4 bits at worst, come near it; a
weight in another order or scale is far beyond."""


@torch.inference_mode()
def weight_of(layer: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(p, q) in `dtype`. layer: y = W x + b; dtype, device: of x. Raises `UnsupportedModel` if it is no linear map."""
    for way in (_bitsandbytes, _blocks_of_fp8, _own_way, _unit_vectors):
        weight = _tried(way, layer, dtype, device)
        if weight is not None and _agrees(layer, weight):
            return weight
    raise UnsupportedModel(f"the weight of a {type(layer).__name__} cannot be found out", field="model")


def bias_of(layer: Any) -> torch.Tensor | None:
    """(p,), of a layer that may not even have the name."""
    bias: torch.Tensor | None = getattr(layer, "bias", None)
    return bias


def without_bias(layer: Any, y: torch.Tensor) -> torch.Tensor:
    bias = bias_of(layer)
    return y if bias is None else y - bias.to(y.dtype)


def _tried(
    way: Callable[[Any, torch.Tensor], Any], layer: Any, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """None: it is not this layer's way. A format that we misread raises anything, or gives a weight that disagrees."""
    try:
        found = way(layer, torch.empty(0, dtype=dtype, device=device))
    except Exception:
        if way is _unit_vectors:
            raise
        return None
    if not isinstance(found, torch.Tensor) or found.shape != (layer.out_features, layer.in_features):
        return None
    return found.to(device=device, dtype=dtype).contiguous()


def _agrees(layer: Any, weight: torch.Tensor) -> bool:
    x = torch.randn(_ROWS, layer.in_features, generator=torch.Generator().manual_seed(1)).to(weight)
    expected = without_bias(layer, layer(x).float())
    found = x.float() @ weight.float().T
    return bool((found - expected).norm() <= _NOISE * expected.norm())


def _bitsandbytes(layer: Any, like: torch.Tensor) -> Any:
    if not type(layer.weight).__module__.startswith("bitsandbytes"):
        return None
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))


def _blocks_of_fp8(layer: Any, like: torch.Tensor) -> Any:
    """W_ij = w_ij s_(i / m, j / n): a scale for each block of m x n, or one for all."""
    scale, weight = getattr(layer, "weight_scale_inv", None), layer.weight
    if scale is None or weight.element_size() > 1:
        return None
    scale = scale.float()
    if scale.numel() > 1:
        for dim, size in enumerate(layer.block_size):
            scale = scale.repeat_interleave(size, dim)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight.float() * scale


def _own_way(layer: Any, like: torch.Tensor) -> Any:
    """HQQ's layers dequantise themselves; torchao's and quanto's weights do."""
    weight = getattr(layer, "weight", None)
    if callable(getattr(layer, "dequantize", None)):
        return layer.dequantize()
    if isinstance(weight, torch.Tensor) and type(weight.data) is not torch.Tensor:
        return weight.dequantize()
    return weight


def _unit_vectors(layer: Any, like: torch.Tensor) -> Any:
    columns, size = [], layer.in_features
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        units = like.new_zeros(count, size)
        units[:, start : start + count].fill_diagonal_(1)
        columns.append(without_bias(layer, layer(units)))
    return torch.cat(columns).T
