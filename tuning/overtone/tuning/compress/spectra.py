"""A delta in the DCT plane, never whole: D = C_p delta_W C_q^T, given row by row.

    D = L R        L: (p, m), R: (m, q), or R the unit matrix

C_p and C_q are orthonormal, so ||D - S||_F = ||delta_W - C_p^T S C_q||_F for every S (Parseval): what is left out of D is
the error of the delta, without building either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from overtone.kernels import SparseCore
from overtone.tuning.compress.cosine import dct

BLOCK = 1 << 20
"""How many numbers of D are held at a time."""

Rows: TypeAlias = slice | torch.Tensor
"""Of D: a slice without a step, or (k,) int64 in any order."""


class Spectrum(Protocol):
    """D = L R of one module."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def right(self) -> torch.Tensor | None:
        """R (m, q) float64; None: the unit matrix."""

    def left(self, rows: Rows) -> torch.Tensor:
        """L[rows]: (k, m) float64."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankSpectrum:
    """Two thin factors. factor: (p, r), right: (r, q); float64."""

    factor: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.factor.shape[0], self.right.shape[1]

    def left(self, rows: Rows) -> torch.Tensor:
        return self.factor[rows]


@dataclass(frozen=True, slots=True, eq=False)
class DenseSpectrum:
    """All of D, of a delta that has no thin factors. matrix: (p, q) float32 or float64."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def right(self) -> None:
        return None

    def left(self, rows: Rows) -> torch.Tensor:
        return self.matrix[rows].to(torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class SparseSpectrum:
    """The core of an adapter that is made of DCT coefficients already."""

    core: SparseCore

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def right(self) -> None:
        return None

    def left(self, rows: Rows) -> torch.Tensor:
        p, q = self.core.shape
        wanted, back = torch.unique(torch.arange(p)[rows], return_inverse=True)
        place = torch.full((p,), -1)
        place[wanted] = torch.arange(wanted.numel())
        places = place[self.core.rows.to(torch.int64)]
        inside = places >= 0
        dense = torch.zeros(wanted.numel(), q, dtype=torch.float64)
        dense[places[inside], self.core.cols[inside].to(torch.int64)] = self.core.values[inside].to(torch.float64)
        return dense[back]


def low_rank(b: torch.Tensor, a: torch.Tensor) -> LowRankSpectrum:
    """Of delta_W = b a: (C_p b) (a C_q^T). b: (p, r), a: (r, q) float64."""
    return LowRankSpectrum(dct(b.T).T.contiguous(), dct(a))


def dense(delta: torch.Tensor) -> DenseSpectrum:
    """Of a dense delta_W (p, q) float32 or float64, whose memory D takes; each axis is transformed in float64, by blocks."""
    p, q = delta.shape
    for rows in spans(p, q):
        delta[rows] = dct(delta[rows].to(torch.float64)).to(delta.dtype)
    for cols in spans(q, p):
        delta[:, cols] = dct(delta[:, cols].T.to(torch.float64).contiguous()).T.to(delta.dtype)
    return DenseSpectrum(delta)


def blocks(spectrum: Spectrum) -> Iterator[tuple[int, torch.Tensor]]:
    """(r q, D[r : r + k]) for consecutive rows, float64: the place of the block's first number in D as one line, and it."""
    p, q = spectrum.shape
    for rows in spans(p, q):
        left = spectrum.left(rows)
        yield rows.start * q, left if spectrum.right is None else left @ spectrum.right


def spans(count: int, width: int) -> Iterator[slice]:
    """0 to `count` in pieces of which each, times `width`, is about `BLOCK` numbers."""
    step = max(1, BLOCK // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
