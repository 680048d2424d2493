"""Cores in float64 without the rows and columns that are zero: dense, and as a product of two narrow matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from overtone.adapters.bridges.singular import leading, numerical_rank
from overtone.kernels import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SparseCore,
)

MOST_FOUND = 512
"""The largest rank that is looked for in a core which is not of low rank by itself."""


class Compact(NamedTuple):
    """K[rows[i], cols[j]] = matrix[i, j], zero elsewhere. rows: (m,), cols: (n,) int64; matrix: (m, n) float64."""

    rows: torch.Tensor
    matrix: torch.Tensor
    cols: torch.Tensor


class Factored(NamedTuple):
    """K[rows][:, cols] = left right, zero elsewhere. left: (m, k), right: (k, n) float64."""

    rows: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    cols: torch.Tensor


def compact(core: SparseCore | DenseCore | ModulatedCore) -> Compact:
    """The part of a core that is not zero."""
    if isinstance(core, SparseCore):
        rows, row_places = torch.unique(core.rows.to(torch.int64), return_inverse=True)
        cols, col_places = torch.unique(core.cols.to(torch.int64), return_inverse=True)
        matrix = torch.zeros(rows.numel(), cols.numel(), dtype=torch.float64)
        matrix[row_places, col_places] = core.values.to(torch.float64)
        return Compact(rows, matrix, cols)
    matrix = core.matrix.to(torch.float64) * core.scale if isinstance(core, DenseCore) else _modulated(core)
    return Compact(torch.arange(matrix.shape[0]), matrix, torch.arange(matrix.shape[1]))


def own_factors(core: LowRankCore | KroneckerCore | DenseCore | DiagonalCore) -> Factored:
    """The factors that a core has by its definition."""
    if isinstance(core, LowRankCore):
        left, right = core.b.to(torch.float64) * core.scale, core.a.to(torch.float64)
    elif isinstance(core, KroneckerCore):
        # (b a) kron k^T = (b kron k^T) (a kron I)
        a, b, k = (t.to(torch.float64) for t in (core.a, core.b, core.k))
        left = torch.kron(b * core.scale, k.T.contiguous())
        right = torch.kron(a, torch.eye(k.shape[0], dtype=torch.float64))
    elif isinstance(core, DiagonalCore):
        left, right = torch.eye(core.values.numel(), dtype=torch.float64), torch.diag(core.values.to(torch.float64))
    else:
        matrix = core.matrix.to(torch.float64) * core.scale
        unit = torch.eye(min(matrix.shape), dtype=torch.float64)
        left, right = (matrix, unit) if matrix.shape[0] >= matrix.shape[1] else (unit, matrix)
    return Factored(torch.arange(left.shape[0]), left, right, torch.arange(right.shape[1]))


def found_factors(core: Core, shape: tuple[int, int]) -> Factored | None:
    """Of a sparse core with few distinct rows or columns, the singular vectors that are not of zero.

    None if they could be more than half as many as a layer of `shape` has.
    """
    if not isinstance(core, SparseCore):
        return None
    few = min(torch.unique(core.rows).numel(), torch.unique(core.cols).numel())
    if few > min(MOST_FOUND, min(shape) // 2):
        return None
    rows, matrix, cols = compact(core)
    found = leading(matrix, few)
    rank = max(1, numerical_rank(found.s, matrix.shape))
    left, right = found.halves()
    return Factored(rows, left[:, :rank], right[:rank], cols)


def circulant(core: CirculantCore) -> torch.Tensor:
    """The whole block matrix: [i b + u, j b + v] = scale kernel[i, j, (v - u) mod b]."""
    m, n, b = core.kernel.shape
    offsets = (torch.arange(b)[None, :] - torch.arange(b)[:, None]) % b
    blocks = core.kernel.to(torch.float64)[:, :, offsets] * core.scale
    return blocks.permute(0, 2, 1, 3).reshape(m * b, n * b)


def _modulated(core: ModulatedCore) -> torch.Tensor:
    """[k nb + j, i] = scale lam[k, j] gamma[j, i] A[k, i], or its transpose."""
    lam, gamma = core.lam.to(torch.float64), core.gamma.to(torch.float64)
    basis = core.basis.matrix[:, : gamma.shape[1]].to(torch.float64)
    full = (core.scale * lam[:, :, None] * gamma * basis[:, None]).flatten(0, 1)
    return full.T if core.transposed else full
