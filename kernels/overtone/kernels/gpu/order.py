"""The order in which the transforms take a row's numbers (see `overtone.kernels.gpu.plans`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source(n, size, DCT: tl.constexpr):
    """P(n) of the DCT, n of the DFT."""
    if DCT:
        n = tl.where(n < (size + 1) // 2, 2 * n, 2 * (size - 1 - n) + 1)
    return n
