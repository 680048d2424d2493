"""The slow twins: every operator of this layer by its definition. Tests and benchmarks import them; the server does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from overtone.kernels.types import Delta, FrameKind, SparseCore


def dct_matrix(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """C with C[k, j] = s_k cos(pi (2 j + 1) k / (2 N)): orthonormal DCT-II, row = frequency. Returns (size, size)."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    j = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * j + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix.to(dtype)


def frame_matrix(kind: FrameKind, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The frame as a dense matrix, row = frequency."""
    return {FrameKind.DCT: dct_matrix}[kind](size, dtype)


def dct_analyse(x: torch.Tensor) -> torch.Tensor:
    """z = C x along the last axis; computed in float64, returned in x's dtype."""
    return (x.double() @ dct_matrix(x.shape[-1]).T).to(x.dtype)


def dct_synthesise(u: torch.Tensor) -> torch.Tensor:
    """y = C^T u along the last axis; computed in float64, returned in u's dtype."""
    return (u.double() @ dct_matrix(u.shape[-1])).to(u.dtype)


def sparse_dense(core: SparseCore) -> torch.Tensor:
    """K as a dense float64 matrix of `core.shape`; duplicate coordinates add."""
    dense = torch.zeros(core.shape, dtype=torch.float64)
    dense.index_put_((core.rows.long(), core.cols.long()), core.values.double(), accumulate=True)
    return dense


def sparse_apply(z: torch.Tensor, cores: Sequence[SparseCore | None], out_features: int) -> torch.Tensor:
    """u[t] = K_t z[t], token by token; rows whose core is None are zero.

    z: (T, q); cores: T entries of shape (p, q); returns (T, p) in z's dtype, computed in float64.
    """
    u = torch.zeros(z.shape[0], out_features, dtype=torch.float64)
    for t, core in enumerate(cores):
        if core is not None:
            u[t] = sparse_dense(core) @ z[t].double()
    return u.to(z.dtype)


def dense_delta(delta: Delta) -> torch.Tensor:
    """delta_W = S^T K A as a dense float64 matrix (p, q)."""
    p, q = delta.shape
    synthesis = frame_matrix(delta.synthesis, p)
    analysis = frame_matrix(delta.analysis, q)
    return synthesis.T @ sparse_dense(delta.core) @ analysis
