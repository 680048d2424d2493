"""A delta as one LoRA pair: exact where its terms allow it, else the best of a given rank; the error measured either way.

delta_W ~ b a        error = ||delta_W - b a||_F in float64, b and a as they are stored
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from overtone.adapters.bridges.core_parts import compact
from overtone.adapters.bridges.factors import Pair, Weight, dense_term, exact_pair
from overtone.adapters.bridges.frame_rows import orthonormal, spread
from overtone.adapters.bridges.singular import leading
from overtone.errors import InvalidRequest, NonFiniteAdapter
from overtone.kernels import Delta, SparseCore

_CHUNK = 1 << 22
"""How many numbers of delta_W are compared at a time."""


@dataclass(frozen=True)
class Choice:
    """rank: of what is not exact, None to refuse that; truncate: whether exact pairs of a larger rank are cut to it too;
    dtype: of the stored numbers."""

    rank: int | None = None
    truncate: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Fitted:
    """b: (p, r), a: (r, q), as stored. exact: but for rounding. error, norm: ||delta_W - b a|| and ||delta_W||."""

    b: torch.Tensor
    a: torch.Tensor
    exact: bool
    error: float
    norm: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def relative_error(self) -> float:
        return relative(self.error, self.norm)


def relative(error: float, norm: float) -> float:
    """error / norm; of a delta that is zero, 0 if it is met and infinity if not."""
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def fit(module: str, delta: Delta, weight: Weight, choice: Choice) -> Fitted:
    """Raises `InvalidRequest` if a rank is needed and not given, `NonFiniteAdapter` for what the dtype cannot hold."""
    whole = _exact(delta, weight)
    if whole is not None and (not choice.truncate or choice.rank is None or whole.rank <= choice.rank):
        return _stored(module, whole, choice, lambda rows: whole.b[rows] @ whole.a, exact=True)
    if choice.rank is None:
        raise InvalidRequest(
            f"{module} has no exact LoRA form of low rank: give the rank of an approximation with --rank",
            field="rank",
            metadata={"module": module},
        )
    if whole is not None:
        return _stored(module, _cut(whole, choice.rank), choice, lambda rows: whole.b[rows] @ whole.a, exact=False)
    dense = torch.zeros(delta.shape, dtype=torch.float64)
    for term in delta.terms:
        dense += dense_term(term, delta.shape, weight)
    return _stored(module, _best(delta, dense, choice.rank), choice, lambda rows: dense[rows], exact=False)


def _exact(delta: Delta, weight: Weight) -> Pair | None:
    """The pairs of all terms side by side."""
    pairs = []
    for term in delta.terms:
        pair = exact_pair(term, delta.shape, weight)
        if pair is None:
            return None
        pairs.append(pair)
    b, a = torch.cat([pair.b for pair in pairs], dim=1), torch.cat([pair.a for pair in pairs])
    if a.shape[0] <= min(delta.shape):
        return Pair(b, a)
    # More rank than a layer has: the product itself beside a unit matrix says the same.
    unit = torch.eye(min(delta.shape), dtype=torch.float64)
    return Pair(unit, b @ a) if delta.shape[0] < delta.shape[1] else Pair(b @ a, unit)


def _cut(pair: Pair, rank: int) -> Pair:
    """The best approximation of a product, from that of the small core between two orthonormal bases."""
    left, right = torch.linalg.qr(pair.b), torch.linalg.qr(pair.a.T)
    b, a = leading(left.R @ right.R.T, rank).halves()
    return Pair(left.Q @ b, a @ right.Q.T)


def _best(delta: Delta, dense: torch.Tensor, rank: int) -> Pair:
    """The best approximation of delta_W. Orthonormal frames leave singular values as they are, so a sparse core between
    two of them is decomposed in place of delta_W, without its zeros."""
    term = delta.terms[0]
    alone = len(delta.terms) == 1 and term.gain is None
    if alone and isinstance(term.core, SparseCore) and orthonormal(term.analysis) and orthonormal(term.synthesis):
        rows, matrix, cols = compact(term.core)
        b, a = leading(matrix, rank).halves()
        return Pair(spread(term.synthesis, rows, b, delta.shape[0]), spread(term.analysis, cols, a.T, delta.shape[1]).T)
    return Pair(*leading(dense, rank).halves())


def _stored(
    module: str, pair: Pair, choice: Choice, rows_of_delta: Callable[[slice], torch.Tensor], *, exact: bool
) -> Fitted:
    """The pair in its dtype, and what that makes of delta_W."""
    b, a = (t.to(choice.dtype).contiguous() for t in pair)
    if not (bool(b.isfinite().all()) and bool(a.isfinite().all())):
        name = str(choice.dtype).removeprefix("torch.")
        raise NonFiniteAdapter(f"the LoRA pair of {module} overflows {name}: choose another dtype", field=module)
    wide_b, wide_a = b.to(torch.float64), a.to(torch.float64)
    error = norm = 0.0
    step = max(1, _CHUNK // a.shape[1])
    for start in range(0, b.shape[0], step):
        rows = slice(start, start + step)
        wanted = rows_of_delta(rows)
        norm += float(wanted.square().sum())
        error += float((wanted - wide_b[rows] @ wide_a).square().sum())
    return Fitted(b, a, exact, math.sqrt(error), math.sqrt(norm))
