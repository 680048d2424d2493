"""Frames and cores: the vocabulary of the kernel layer. Knows no adapter family, no request and no model.

Every delta is

    delta_W = S^T K A            delta_W: (p, q), out x in
    y      += S^T (K (A x))      x: (q,), y: (p,)

with an analysis frame A and a synthesis frame S, which belong to a size and are shared by every adapter, and a core K,
which one adapter owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class FrameKind(Enum):
    """A change of basis that depends on nothing but its size."""

    DCT = "dct"
    """Orthonormal DCT-II: C[k, j] = s_k cos(pi (2 j + 1) k / (2 N)), s_0 = sqrt(1/N), s_k = sqrt(2/N)."""


@dataclass(frozen=True, slots=True)
class SparseCore:
    """K with few non-zeros: K[rows[i], cols[i]] = values[i]; coordinates are unique and sorted by (row, col).

    rows, cols: (n,) int32 with 0 <= rows < shape[0] and 0 <= cols < shape[1]; values: (n,) float32, any scale folded in.
    shape: (p, q).
    """

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        return int(self.values.numel())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.rows, self.cols, self.values))


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to one linear layer."""

    analysis: FrameKind
    core: SparseCore
    synthesis: FrameKind

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape


def sparse_core(rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> SparseCore:
    """A `SparseCore` from coordinates in any order; duplicates add, in float64.

    rows, cols: (n,) integer within `shape`; values: (n,) floating point.
    """
    p, q = shape
    assert rows.shape == cols.shape == values.shape
    assert rows.ndim == 1
    flat = rows.to(torch.int64) * q + cols.to(torch.int64)
    assert flat.numel() == 0 or (int(flat.min()) >= 0 and int(flat.max()) < p * q)
    unique, inverse = torch.unique(flat, sorted=True, return_inverse=True)
    summed = torch.zeros(unique.numel(), dtype=torch.float64).index_add_(0, inverse, values.to(torch.float64))
    return SparseCore(
        rows=(unique // q).to(torch.int32),
        cols=(unique % q).to(torch.int32),
        values=summed.to(torch.float32),
        shape=shape,
    )
