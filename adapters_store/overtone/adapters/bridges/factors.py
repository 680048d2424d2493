"""Terms as matrices in float64: as a product of two narrow ones where that is exact, and dense.

    diag(g) S^T K A = (diag(g) S^T L) (R A)          K = L R

A core's factors L and R are its own where it has some (low rank, Kronecker, what lies between two projections). A sparse
core lives in its distinct rows and columns; where these are few, L and R are its singular vectors in there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from overtone.adapters.bridges.core_parts import Factored, circulant, compact, found_factors, own_factors
from overtone.adapters.bridges.frame_rows import rows_of, spread
from overtone.kernels import CirculantCore, DenseCore, DiagonalCore, FrameKind, KroneckerCore, LowRankCore, Term

Weight = Callable[[], torch.Tensor]
"""Gives the layer's frozen weight (p, q)."""


class Pair(NamedTuple):
    """delta_W = b a. b: (p, k), a: (k, q)."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def exact_pair(term: Term, shape: tuple[int, int], weight: Weight) -> Pair | None:
    """The term as two narrow matrices, None if it has no such form."""
    core, (p, q) = term.core, shape
    found: Factored | None
    if isinstance(core, DiagonalCore):
        found = own_factors(core) if term.analysis.shared is not None else None
    elif isinstance(core, LowRankCore | KroneckerCore | DenseCore):
        found = own_factors(core)
    else:
        found = found_factors(core, shape)
    if found is None:
        return None
    b = spread(term.synthesis, found.rows, found.left, p, synthesis=True)
    return Pair(_gained(term, b), _analysed(term, found.right, found.cols, q, weight))


def dense_term(term: Term, shape: tuple[int, int], weight: Weight) -> torch.Tensor:
    """The term as (p, q) float64."""
    core, (p, q) = term.core, shape
    if isinstance(core, CirculantCore):
        return _gained(term, circulant(core))
    if isinstance(core, DiagonalCore):
        rows, values = torch.arange(core.values.numel()), core.values.to(torch.float64)[:, None]
        analysed = _weight_rows(weight, rows) if _on_weight(term) else rows_of(term.analysis, rows, q)
        analysed = analysed * values
    elif isinstance(core, LowRankCore | KroneckerCore):
        rows, left, right, cols = own_factors(core)
        analysed = left @ _analysed(term, right, cols, q, weight)
    else:
        rows, matrix, cols = compact(core)
        analysed = _analysed(term, matrix, cols, q, weight)
    return _gained(term, spread(term.synthesis, rows, analysed, p, synthesis=True))


def _analysed(term: Term, matrix: torch.Tensor, cols: torch.Tensor, q: int, weight: Weight) -> torch.Tensor:
    """matrix A[cols]. matrix: (m, n); returns (m, q)."""
    if _on_weight(term):
        return matrix @ _weight_rows(weight, cols)
    return spread(term.analysis, cols, matrix.T, q).T


def _on_weight(term: Term) -> bool:
    return term.analysis.kind is FrameKind.WEIGHT


def _weight_rows(weight: Weight, rows: torch.Tensor) -> torch.Tensor:
    return weight()[rows].to(torch.float64)


def _gained(term: Term, b: torch.Tensor) -> torch.Tensor:
    return b if term.gain is None else b * term.gain.to(torch.float64)[:, None]
