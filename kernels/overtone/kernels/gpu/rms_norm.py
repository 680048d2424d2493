"""y = weight * (x / sqrt(mean(x^2) + epsilon)), and the same of a sum of two.

float32 inside; what is multiplied by the weight is first rounded to x's dtype, as by transformers' LlamaRMSNorm. A program
has one row, all of it at once: its sum has one order, by the row's length alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LARGEST = 1 << 15
"""Numbers of a row: of 16 warps, 64 in each thread."""


def norm_warps(n: int) -> int:
    """Of a program with a row of n numbers."""
    return int(min(16, max(4, triton.next_power_of_2(n) // 1024)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, y: torch.Tensor) -> None:
    """x: (m, n), y: (m, n) of x's dtype, the last dimension of both contiguous; weight: (n,)."""
    _launch(x, None, weight, epsilon, None, y)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, total: torch.Tensor, y: torch.Tensor
) -> None:
    """total = x + residual, rounded, and y the norm of it. total may be x or residual."""
    _launch(x, residual, weight, epsilon, total, y)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    total: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    m, n = x.shape
    other, summed = x if residual is None else residual, y if total is None else total
    assert all(one.shape == x.shape and one.stride(1) == 1 and one.dtype is x.dtype for one in (x, other, summed, y))
    assert weight.shape == (n,)
    assert weight.is_contiguous()
    assert n <= _LARGEST
    if not m:
        return
    _rms_norm[(m,)](
        x, other, weight, summed, y, x.stride(0), other.stride(0), summed.stride(0), y.stride(0), epsilon,
        N=n, WIDTH=triton.next_power_of_2(n), ADDED=residual is not None, num_warps=norm_warps(n), enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _rms_norm(
    x_ptr,
    other_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    x_stride,
    other_stride,
    total_stride,
    y_stride,
    epsilon,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    there = j < N
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + j, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(other_ptr + row * other_stride + j, mask=there, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total_ptr + row * total_stride + j, rounded, mask=there)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / N + epsilon)
    weight = tl.load(weight_ptr + j, mask=there, other=0.0).to(tl.float32)
    y = weight * (x * scale).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * y_stride + j, y.to(dtype), mask=there)
