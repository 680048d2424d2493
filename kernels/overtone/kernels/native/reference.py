"""What each native kernel computes, in torch's operators: slow, obvious, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def product(x: torch.Tensor, weight: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + plus. x: (m, q); weight: (p, q)."""
    y = x @ weight.T
    return y if plus is None else y + plus


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def silu_times(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. x: (m, 2 n)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """rope. x: (m, heads, D); cos, signed_sin: (m, D), the sine's first half negated."""
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return x * cos[:, None] + swapped * signed_sin[:, None]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One token's softmax(scale q K^T) V. query: (heads, D); keys, values: (L, kv_heads, D)."""
    group = query.shape[0] // keys.shape[1]
    repeated = (one.repeat_interleave(group, dim=1) for one in (keys, values))
    k, v = (one.transpose(0, 1) for one in repeated)  # (heads, L, D)
    weights = (scale * k @ query[:, :, None]).softmax(1)
    return (weights * v).sum(1)
