"""What a decoder layer of the Llama shape computes beside its products, as kernels of a device have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each query head and each key head (Qwen3): weights (D,)."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class LayerKernels(Protocol):
    """Row by row, sums in float32, results in the dtype of the inputs."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight. x: (m, n); weight: (n,)."""

    def silu_times(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. x: (m, 2 n), gate then up, contiguous; returns (m, n)."""

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

        qkv: (m, (heads + 2 kv_heads) D), contiguous; cos, signed_sin: (m, D), contiguous; slots: (m,) int64; cache: a
        layer's part of it.
        """
