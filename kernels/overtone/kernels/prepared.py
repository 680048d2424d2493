"""Cores ready to be applied to the tokens that share them: u = K z for every row of z.

Each class is the fast form of the core of the same name in `overtone.kernels.cores`, on its device and in float32; its
slow twin is `overtone.kernels.reference.core_dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from overtone.kernels.cores import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    KroneckerCore,
    LowRankCore,
    SparseCore,
    numbers_of,
)
from overtone.kernels.sparse import CsrCore, PatternCache, compress

KRONECKER_FROM = 5
"""Kernels of at least this size are applied as they are, smaller ones as the low-rank pair that they equal. Measured on 2
CPU cores (bench/results/dcft_execution.jsonl): the pair takes a third of the time at size 2 and half at 4; at 8 it takes as
long for many tokens and half as long for one. But it takes about size * size times the memory, which decides above 4.
"""
_MODULATED_ELEMENTS = 1 << 24
"""How many numbers `PreparedModulated` may spread a chunk of tokens to."""


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedLowRank:
    """u = up^T (down z). down: (r, q), up: (r, p) float32, both contiguous."""

    down: torch.Tensor
    up: torch.Tensor

    def __post_init__(self) -> None:
        assert self.down.is_contiguous()
        assert self.up.is_contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[1], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.down, self.up)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q) float32, or (T,) int64 for T one-hot vectors; returns (T, p)."""
        return (z @ self.down.T if z.is_floating_point() else self.down.T[z]) @ self.up


@dataclass(frozen=True, slots=True, eq=False)
class PreparedDense:
    """matrix: (m_out, m_in) float32; z may have more columns than m_in, of which the first count."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.matrix)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, : self.matrix.shape[1]] @ self.matrix.T


@dataclass(frozen=True, slots=True, eq=False)
class PreparedDiagonal:
    """values: (m,) float32; z may have more columns than m, of which the first count."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.numel(), self.values.numel()

    @property
    def nbytes(self) -> int:
        return _nbytes(self.values)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, : self.values.numel()] * self.values


@dataclass(frozen=True, slots=True, eq=False)
class PreparedKronecker:
    """at: (q / d, R), bt: (R, p / d), k: (d, d) float32.

    The same map is a low-rank pair of rank R d, the other honest execution (`kronecker_pair`): faster for small d, where
    three small products cost more than two larger ones, but with about d * d times as many numbers to keep.
    """

    at: torch.Tensor
    bt: torch.Tensor
    k: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.bt.shape[1] * self.k.shape[0], self.at.shape[0] * self.k.shape[0]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.at, self.bt, self.k)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        blocks = z.reshape(len(z), self.at.shape[0], self.k.shape[0])  # (T, q / d, d)
        inner = (self.at.T @ blocks) @ self.k  # (T, R, d)
        outer: torch.Tensor = self.bt.T @ inner
        return outer.flatten(1)


def prepare_kronecker(core: KroneckerCore, device: torch.device | None = None) -> PreparedKronecker:
    at, bt = (t.to(device, torch.float32).T.contiguous() for t in (core.a, core.b))
    return PreparedKronecker(at, bt, core.k.to(device, torch.float32) * core.scale)


def kronecker_pair(core: PreparedKronecker) -> PreparedLowRank:
    """b a kron k^T = (b kron k^T) (a kron I): rank R d."""
    eye = torch.eye(core.k.shape[0], device=core.k.device)
    return PreparedLowRank(_kron(core.at.T.contiguous(), eye), _kron(core.bt, core.k))


def _kron(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # torch.kron refuses some transposed inputs.
    (m, n), (k, j) = x.shape, y.shape
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(m * k, n * j)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCirculant:
    """spectra: (b // 2 + 1, q / b, p / b) complex64, the conjugate transforms of the kernels, scale folded in."""

    spectra: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.spectra.shape[2], self.spectra.shape[1]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.spectra)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q / b, b // 2 + 1) complex64; returns (T, p / b, b // 2 + 1)."""
        return torch.bmm(z.permute(2, 0, 1), self.spectra).permute(1, 2, 0)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedModulated:
    """basis: (r, n), gamma: (nb, n), lam: (r, nb) float32, scale folded into lam. The basis belongs to many adapters."""

    basis: torch.Tensor
    gamma: torch.Tensor
    lam: torch.Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        many, n = self.lam.numel(), self.gamma.shape[1]
        return (n, many) if self.transposed else (many, n)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.gamma, self.lam)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, m_in) float32, more columns than m_in if it comes from a projection; returns (T, m_out)."""
        one = self._gather if self.transposed else self._spread
        chunk = max(1, _MODULATED_ELEMENTS // self.gamma.numel())
        return torch.cat([one(part) for part in torch.split(z, chunk)]) if len(z) > chunk else one(z)

    def _spread(self, z: torch.Tensor) -> torch.Tensor:
        inner = (z[:, None, : self.gamma.shape[1]] * self.gamma) @ self.basis.T  # (T, nb, r)
        return (inner.transpose(1, 2) * self.lam).flatten(1)

    def _gather(self, z: torch.Tensor) -> torch.Tensor:
        inner = z[:, : self.lam.numel()].reshape(len(z), *self.lam.shape) * self.lam  # (T, r, nb)
        spread: torch.Tensor = (inner.transpose(1, 2) @ self.basis) * self.gamma
        return spread.sum(1)


PreparedCore: TypeAlias = (
    CsrCore
    | PreparedLowRank
    | PreparedDense
    | PreparedDiagonal
    | PreparedKronecker
    | PreparedCirculant
    | PreparedModulated
)


def prepare(core: Core, device: torch.device | None = None, patterns: PatternCache | None = None) -> PreparedCore:
    """`core` in the form that is applied, on `device`. patterns: where sparse cores find the patterns that they share.

    The tensors of shared matrices stay where they are: whoever makes frames puts them on the device.
    """

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, torch.float32)

    if isinstance(core, SparseCore):
        return compress(core, device, patterns)
    if isinstance(core, LowRankCore):
        return PreparedLowRank(ready(core.a).contiguous(), ready(core.b).T.contiguous() * core.scale)
    if isinstance(core, DenseCore):
        return PreparedDense(ready(core.matrix) * core.scale)
    if isinstance(core, DiagonalCore):
        return PreparedDiagonal(ready(core.values))
    if isinstance(core, KroneckerCore):
        kronecker = prepare_kronecker(core, device)
        return kronecker if core.k.shape[0] >= KRONECKER_FROM else kronecker_pair(kronecker)
    if isinstance(core, CirculantCore):
        spectra = torch.fft.rfft(ready(core.kernel) * core.scale).conj()
        return PreparedCirculant(spectra.permute(2, 1, 0).resolve_conj().contiguous())
    basis = core.basis.matrix[:, : core.gamma.shape[1]]
    return PreparedModulated(ready(basis), ready(core.gamma), ready(core.lam) * core.scale, core.transposed)


def prepared_nbytes(core: Core) -> int:
    """`prepare(core).nbytes`, without preparing it, for patterns that are shared if they can be."""
    if isinstance(core, SparseCore):
        entries, rows = core.nnz, core.shape[0]
        return 4 * entries + (0 if core.pattern.key else 4 * (2 * entries + rows + 1))
    if isinstance(core, CirculantCore):
        m, n, b = core.kernel.shape
        return 8 * m * n * (b // 2 + 1)
    if isinstance(core, KroneckerCore) and core.k.shape[0] < KRONECKER_FROM:
        return 4 * core.a.shape[0] * core.k.shape[0] * sum(core.shape)
    return 4 * sum(t.numel() for t in numbers_of(core).values())
