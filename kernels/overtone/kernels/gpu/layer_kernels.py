"""The kernels of a decoder layer behind the methods that `overtone.kernels.native.NativeKernels` has, so that a fused layer
calls either."""

from __future__ import annotations

import torch

from overtone.kernels.gpu import rms_norm as norms_of_rows
from overtone.kernels.gpu import rotate_and_write as rotation
from overtone.kernels.gpu import silu_times as gates
from overtone.kernels.gpu.layer_configs import rotate_config
from overtone.kernels.layers import HeadNorms


class GpuKernels:
    """Results are new tensors of the input's dtype: a CUDA graph's capture keeps their memory. No call waits for the
    device. A row of each result depends on that row's inputs alone, to the last bit."""

    def __init__(self, capability: int) -> None:
        """capability: 80, 90, 100 of sm_80, sm_90, sm_100."""
        self._rotate = rotate_config(capability)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight. x: (m, n); weight: (n,)."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norms_of_rows.rms_norm(x, weight, epsilon, y)
        return y

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + residual, and its norm. x, residual: (m, n)."""
        total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        norms_of_rows.add_rms_norm(x, residual, weight, epsilon, total, y)
        return total, y

    def silu_times(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. x: (m, 2 n), gate then up; returns (m, n)."""
        y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
        gates.silu_times(x, y)
        return y

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        signed_sin: torch.Tensor,
        slots: torch.Tensor,
        cache: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotates queries and keys in place, each head first normed; writes keys and values to their slots.

        qkv: (m, (heads + 2 kv_heads) D); cos, signed_sin: (m, D), contiguous; slots: (m,) int64, -1: nowhere; cache: (pages,
        page_tokens, 2, kv_heads, D).
        """
        rotation.rotate_and_write(qkv, cos, signed_sin, slots, cache, norms, self._rotate)
