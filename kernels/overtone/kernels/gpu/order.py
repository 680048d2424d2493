"""The order in which the transforms take a row's numbers (see `overtone.kernels.gpu.plans`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source(n, SIZE: tl.constexpr):
    """P(n)."""
    half: tl.constexpr = (SIZE + 1) // 2
    return tl.where(n < half, 2 * n, 2 * (SIZE - 1 - n) + 1)
