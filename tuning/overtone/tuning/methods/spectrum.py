"""A sparse spectrum applied to a layer's input, with gradients of its coefficients and of where they are.

    y = alpha C_p^T S C_q x        S[l1_i, l2_i] += a_i        C_N: orthonormal DCT-II of size N

With g = dL/dy and K = alpha sum over tokens of (C_p g) (C_q x)^T, which is dL/dS, the gradients are

    dL/da_i  = K[l1_i, l2_i]
    dL/dl1_i = clamp(a_i / 2 (K[min(l1_i + 1, p - 1), l2_i] - K[max(l1_i - 1, 0), l2_i]), -1, 1)
    dL/dl2_i   the same along columns
    dL/dx    = alpha C_q^T S^T C_p g

The second is LoCA's central difference (Du et al., ICLR 2025, arXiv 2502.06820), which the authors take from a dense p x q
gradient. Here every K that is needed is one product of two rows over tokens, and nothing of size p x q is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from overtone.adapters.families.loca import HIGHEST
from overtone.tuning.methods.transforms import Transforms

_TOGETHER = 1 << 19
"""Numbers of one intermediate: tokens go through in groups of this many over the largest of p, q and n."""


@dataclass(frozen=True, eq=False)
class Plane:
    """Where the coefficients of one layer lie. shape: (p, q); scale: alpha."""

    shape: tuple[int, int]
    scale: float
    transforms: Transforms


def decode(locations: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """l = round(clamp(t, 0, 0.999) (N - 1)), half to even, as the authors and the server do.

    locations: t, (2, n) float32 or float64; returns (2, n) int64.
    """
    t = locations.detach().clamp(0, HIGHEST)
    return torch.stack([torch.round(t[axis] * (shape[axis] - 1)) for axis in range(2)]).to(torch.int64)


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """What branches compute in: float32 whatever the model's precision, but float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spectral_product(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, plane: Plane, locations: torch.Tensor | None = None
) -> torch.Tensor:
    """y = alpha C_p^T S C_q x, duplicate places add up.

    x: (..., q) of any floating dtype; values: a, (n,); places: l, (2, n) int64 within (p, q); locations: t, (2, n) floating,
    of which `places` is the decoding, if they are to have a gradient: it is dL/dl (N - 1), and 0 for a t outside
    [0, 0.999]. Returns (..., p) in float32, for float64 in float64.
    """
    wide = values.to(working_dtype(x))
    product: torch.Tensor = _SpectralProduct.apply(x, wide, locations, places, plane)  # type: ignore[no-untyped-call]
    return product


class _SpectralProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        locations: torch.Tensor | None,
        places: torch.Tensor,
        plane: Plane,
    ) -> torch.Tensor:
        # x in the model's own precision, and not C_q x: q_proj and v_proj share one x.
        ctx.save_for_backward(x, values, locations, places)
        ctx.plane = plane
        p, q = plane.shape
        rows, cols = places
        tokens = x.reshape(-1, q)
        y = x.new_empty(tokens.shape[0], p, dtype=values.dtype)
        for some in _groups(tokens.shape[0], max(p, q, values.numel())):
            z = _analysed(tokens[some].to(values.dtype), plane)
            y[some] = _synthesised(_spread(z, values * plane.scale, cols, rows, p), plane)
        return y.view(*x.shape[:-1], p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, locations, places = ctx.saved_tensors
        dx, sums = _pass_back(ctx.plane, x, g, values, places, ctx.needs_input_grad[:3])
        da = sums[0] if ctx.needs_input_grad[1] else None
        dt = _location_gradient(locations, values, sums[1:], ctx.plane.shape) if ctx.needs_input_grad[2] else None
        return dx, da, dt, None, None


def _pass_back(
    plane: Plane,
    x: torch.Tensor,
    g: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """dL/dx, if needed, and (3, n): K and the halves of its differences along both axes at the places, as needed."""
    p, q = plane.shape
    rows, cols = places
    tokens, outer = x.reshape(-1, q), g.reshape(-1, p)
    dx = torch.empty_like(tokens) if needed[0] else None
    sums = values.new_zeros(3, values.numel())
    for some in _groups(tokens.shape[0], max(p, q, values.numel())):
        h = _analysed(outer[some].to(values.dtype), plane).mul_(plane.scale)
        if dx is not None:
            dx[some] = _synthesised(_spread(h, values, rows, cols, q), plane).to(dx.dtype)
        if needed[1] or needed[2]:
            z = _analysed(tokens[some].to(values.dtype), plane)
            at_rows, at_cols = h[rows], z[cols]
            if needed[1]:
                sums[0] += (at_rows * at_cols).sum(1)
            if needed[2]:
                sums[1] += (_slope(h, rows) * at_cols).sum(1)
                sums[2] += (at_rows * _slope(z, cols)).sum(1)
    return None if dx is None else dx.view(x.shape), sums


def _location_gradient(
    locations: torch.Tensor, values: torch.Tensor, slopes: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """dL/dt. slopes: (2, n), half the difference of K between the neighbours along each axis."""
    inside = locations.clamp(0, HIGHEST) == locations
    steps = slopes.new_tensor([[size - 1.0] for size in shape])
    return ((values * slopes).clamp(-1, 1) * steps * inside).to(locations.dtype)


def _groups(tokens: int, widest: int) -> Iterator[slice]:
    size = max(1, _TOGETHER // widest)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _analysed(x: torch.Tensor, plane: Plane) -> torch.Tensor:
    """C x: (t, N) -> (N, t), in which gathering a frequency is copying a row."""
    return plane.transforms.analyse(x).T.contiguous()


def _synthesised(u: torch.Tensor, plane: Plane) -> torch.Tensor:
    """C^T u: (N, t) -> (t, N)."""
    return plane.transforms.synthesise(u.T.contiguous())


def _spread(
    z: torch.Tensor, values: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, size: int
) -> torch.Tensor:
    """u[targets[i]] += values[i] z[sources[i]]: (N, t) -> (size, t)."""
    return z.new_zeros(size, z.shape[1]).index_add_(0, targets, z[sources].mul_(values[:, None]))


def _slope(z: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(z[l + 1] - z[l - 1]) / 2 for the frequencies l in `places`; at either end the end itself is its own neighbour."""
    return (z[(places + 1).clamp(max=z.shape[0] - 1)] - z[(places - 1).clamp(min=0)]) / 2
