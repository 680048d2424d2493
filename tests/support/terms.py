"""Random terms of every kind that the kernels know, for one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from overtone.adapters.families.waveft import wavelet_frame
from overtone.adapters.safetensors_writer import key_of
from overtone.kernels import (
    DCT,
    DFT,
    IDENTITY,
    WEIGHT,
    CirculantCore,
    DenseCore,
    DiagonalCore,
    Frame,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SharedMatrix,
    SparseCore,
    SparsePattern,
    Term,
    block_dft,
    projection,
)
from support.cores import random_core

HAAR, DB2 = wavelet_frame("db1"), wavelet_frame("db2")
LARGEST = 512
"""The most rows and columns that a layer may have for its terms to share one matrix."""


def shared_matrix(rows: int, seed: int) -> SharedMatrix:
    """The same for the same arguments, and large enough for every test's layers."""
    matrix = torch.randn(rows, LARGEST, generator=torch.Generator().manual_seed(seed)) / rows**0.5
    return SharedMatrix(key_of(matrix=matrix), matrix)


class RandomTerms:
    """Terms for layers of one shape (p, q), both divisible by 4, as large as a weight with entries of variance 1 / q."""

    def __init__(self, shape: tuple[int, int], seed: int = 0, *, strength: float = 0.3) -> None:
        self.shape = shape
        self._strength = strength
        self._generator = torch.Generator().manual_seed(seed)

    def _random(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator).to(dtype)

    def _sparse(self, shape: tuple[int, int]) -> SparseCore:
        core = random_core(shape, 12, self._generator)
        return SparseCore(core.pattern, core.values * self._strength)

    def make(self, kind: str) -> Term:
        term: Term = getattr(self, kind)()
        return term

    def dct(self) -> Term:
        return Term(DCT, self._sparse(self.shape), DCT)

    def dft(self) -> Term:
        p, q = self.shape
        return Term(DFT, self._sparse((2 * (p // 2 + 1), 2 * (q // 2 + 1))), DFT)

    def sparse(self) -> Term:
        return Term(IDENTITY, self._sparse(self.shape), IDENTITY)

    def haar(self) -> Term:
        return Term(HAAR, self._sparse(self.shape), HAAR)

    def db2(self) -> Term:
        return self._spread(DB2)

    def _spread(self, frame: Frame) -> Term:
        p, q = (frame.coefficients(size) or 0 for size in self.shape)
        return Term(frame, self._sparse((p, q)), frame)

    def shared_pattern(self) -> Term:
        p, q = self.shape
        core = random_core(self.shape, 12, torch.Generator().manual_seed(p * 1000 + q))
        key = key_of(rows=core.rows, cols=core.cols)
        pattern = SparsePattern(core.rows, core.cols, self.shape, key)
        return Term(DCT, SparseCore(pattern, self._random(12) * self._strength), DCT)

    def low_rank(self) -> Term:
        p, q = self.shape
        a, b = self._random(3, q, dtype=torch.bfloat16), self._random(p, 3, dtype=torch.bfloat16)
        return Term(IDENTITY, LowRankCore(a, b, self._strength / q**0.5), IDENTITY)

    def gained_low_rank(self) -> Term:
        term = self.low_rank()
        return Term(term.analysis, term.core, term.synthesis, 1 + 0.3 * self._random(self.shape[0]))

    def weight(self) -> Term:
        return Term(WEIGHT, DiagonalCore(0.3 * self._random(self.shape[0])), IDENTITY)

    def kronecker(self) -> Term:
        p, q = self.shape
        core = KroneckerCore(self._random(2, q // 4), self._random(p // 4, 2), self._random(4, 4), 0.3 / q**0.5)
        return Term(IDENTITY, core, IDENTITY)

    def circulant(self) -> Term:
        p, q = self.shape
        return Term(block_dft(4), CirculantCore(self._random(p // 4, q // 4, 4), 0.3 / q**0.5), block_dft(4))

    def dense(self) -> Term:
        return Term(projection(shared_matrix(24, 7)), DenseCore(self._random(self.shape[0], 5) * 0.1), IDENTITY)

    def vector(self) -> Term:
        frames = projection(shared_matrix(24, 8)), projection(shared_matrix(24, 9))
        gain = 0.3 * self._random(self.shape[0])
        return Term(frames[0], DiagonalCore(self._random(6) * 0.3), frames[1], gain)

    def modulated(self) -> Term:
        q = self.shape[1]
        core = ModulatedCore(shared_matrix(3, 10), self._random(4, q), self._random(3, 4), 0.05)
        return Term(IDENTITY, core, projection(shared_matrix(24, 11)))

    def modulated_transposed(self) -> Term:
        p = self.shape[0]
        core = ModulatedCore(shared_matrix(3, 10), self._random(4, p), self._random(3, 4), 0.05, transposed=True)
        return Term(projection(shared_matrix(24, 11)), core, IDENTITY)


KINDS: Mapping[str, Callable[[RandomTerms], Term]] = {
    name: method
    for name, method in vars(RandomTerms).items()
    if callable(method) and not name.startswith("_") and name != "make"
}
"""Every kind of term by name."""
