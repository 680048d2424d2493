"""Sums of weighted deltas in the domain of their frames: several adapters on one request.

sum over i of w_i delta_W_i        terms of equal frames and kinds of core become one term, all others stay apart
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from overtone.kernels.prepared import (
    PreparedCirculant,
    PreparedCore,
    PreparedDense,
    PreparedDiagonal,
    PreparedKronecker,
    PreparedLowRank,
    PreparedModulated,
)
from overtone.kernels.sparse import CsrCore, CsrPattern
from overtone.kernels.types import Frame, FrameKind


@dataclass(frozen=True, slots=True, eq=False)
class PreparedTerm:
    """A `Term` ready to be applied. gain: (p,) float32 or None."""

    analysis: Frame
    core: PreparedCore
    synthesis: Frame
    gain: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ResidentDelta:
    """A `Delta` ready to be applied."""

    terms: tuple[PreparedTerm, ...]


class Composer:
    """Sums deltas of many layers. A core that serves several layers is scaled and added once, and serves them still."""

    def __init__(self) -> None:
        # The operands are kept beside the results, so that no id() is of something that is gone.
        self._scaled: dict[tuple[int, float], tuple[PreparedCore, PreparedCore]] = {}
        self._sums: dict[tuple[int, int], tuple[PreparedCore, PreparedCore, PreparedCore | None]] = {}

    def compose(self, weighted: Iterable[tuple[float, PreparedTerm]]) -> tuple[PreparedTerm, ...]:
        """The terms of one layer's sum. What they have in common is merged, in the order given."""
        terms: list[PreparedTerm] = []
        for weight, term in weighted:
            term = _without_gain(replace(term, core=self._times(term.core, weight)))
            for i, other in enumerate(terms):
                total = self._sum(other, term)
                if total is not None:
                    terms[i] = total
                    break
            else:
                terms.append(term)
        return tuple(terms)

    def _times(self, core: PreparedCore, weight: float) -> PreparedCore:
        key = id(core), weight
        if key not in self._scaled:
            self._scaled[key] = core, scaled(core, weight)
        return self._scaled[key][1]

    def _sum(self, first: PreparedTerm, second: PreparedTerm) -> PreparedTerm | None:
        """One term for both, None if there is none."""
        if (first.analysis, first.synthesis) != (second.analysis, second.synthesis):
            return None
        if first.gain is not None or second.gain is not None:
            return None
        key = id(first.core), id(second.core)
        if key not in self._sums:
            self._sums[key] = first.core, second.core, _sum_of_cores(first.core, second.core)
        core = self._sums[key][2]
        return None if core is None else replace(_wider(first, second), core=core)


def scaled(core: PreparedCore, weight: float) -> PreparedCore:
    """weight K; what does not depend on the weight is shared with `core`."""
    if isinstance(core, CsrCore):
        return CsrCore(core.pattern, core.values * weight, shared=core.shared)
    if isinstance(core, PreparedLowRank):
        return replace(core, up=core.up * weight)
    if isinstance(core, PreparedDense):
        return replace(core, matrix=core.matrix * weight)
    if isinstance(core, PreparedDiagonal):
        return replace(core, values=core.values * weight)
    if isinstance(core, PreparedKronecker):
        return replace(core, k=core.k * weight)
    if isinstance(core, PreparedCirculant):
        return replace(core, spectra=core.spectra * weight)
    assert isinstance(core, PreparedModulated)
    return replace(core, lam=core.lam * weight)


def _without_gain(term: PreparedTerm) -> PreparedTerm:
    """diag(g) b a is a low-rank pair itself."""
    if term.gain is None or term.synthesis.kind is not FrameKind.IDENTITY or not isinstance(term.core, PreparedLowRank):
        return term
    return replace(term, core=replace(term.core, up=term.core.up * term.gain), gain=None)


def _wider(first: PreparedTerm, second: PreparedTerm) -> PreparedTerm:
    """Of two with equal frames the one whose matrix holds more rows."""

    def rows(term: PreparedTerm) -> int:
        return 0 if term.analysis.shared is None else len(term.analysis.shared.matrix)

    return first if rows(first) >= rows(second) else second


def _sum_of_cores(first: PreparedCore, second: PreparedCore) -> PreparedCore | None:
    if isinstance(first, CsrCore) and isinstance(second, CsrCore):
        return _sum_of_sparse(first, second)
    if isinstance(first, PreparedLowRank) and isinstance(second, PreparedLowRank):
        return PreparedLowRank(torch.cat((first.down, second.down)), torch.cat((first.up, second.up)))
    if first.shape != second.shape:
        return None
    if isinstance(first, PreparedDense) and isinstance(second, PreparedDense):
        return PreparedDense(first.matrix + second.matrix)
    if isinstance(first, PreparedDiagonal) and isinstance(second, PreparedDiagonal):
        return PreparedDiagonal(first.values + second.values)
    if isinstance(first, PreparedCirculant) and isinstance(second, PreparedCirculant):
        return PreparedCirculant(first.spectra + second.spectra)
    return None


def _sum_of_sparse(first: CsrCore, second: CsrCore) -> CsrCore:
    if first.pattern is second.pattern:
        return CsrCore(first.pattern, first.values + second.values, shared=first.shared)
    p, q = first.shape
    flat = torch.cat([_flat(core.pattern) for core in (first, second)])
    unique, places = torch.unique(flat, sorted=True, return_inverse=True)
    values = torch.zeros(unique.numel(), dtype=torch.float64, device=flat.device)
    values.index_add_(0, places, torch.cat((first.values, second.values)).double())
    pattern = CsrPattern((unique // q).to(torch.int32), (unique % q).to(torch.int32), (p, q))
    return CsrCore(pattern, values.float(), shared=False)


def _flat(pattern: CsrPattern) -> torch.Tensor:
    """Coordinates as row * q + col, int64."""
    return pattern.rows.long() * pattern.shape[1] + pattern.cols
