"""y = silu(gate) * up, silu(g) = g / (1 + exp(-g)): float32 inside, silu rounded before the product as in transformers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SILU_BLOCK = 1024
"""Numbers of a program, of 4 warps."""


def silu_times(both: torch.Tensor, y: torch.Tensor) -> None:
    """both: (m, 2 n), gate then up; y: (m, n) of its dtype; the last dimension of both contiguous."""
    m, n = y.shape
    assert both.shape == (m, 2 * n)
    assert both.stride(1) == y.stride(1) == 1
    assert both.dtype is y.dtype
    if not m:
        return
    _silu_times[m, triton.cdiv(n, SILU_BLOCK)](
        both, y, both.stride(0), y.stride(0), n, BLOCK=SILU_BLOCK, num_warps=4, enable_fp_fusion=True
    )


@triton.jit
def _silu_times(both_ptr, y_ptr, both_stride, y_stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = j < n
    gate = tl.load(both_ptr + row * both_stride + j, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * both_stride + n + j, mask=there, other=0.0).to(tl.float32)
    # exp of what is at most 0 cannot overflow.
    fade = tl.exp(-tl.abs(gate))
    silu = gate * tl.where(gate < 0, fade, 1.0) / (1.0 + fade)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + row * y_stride + j, (silu.to(dtype).to(tl.float32) * up).to(dtype), mask=there)
