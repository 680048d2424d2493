"""A cosine transform as two products with small matrices, and their tables.

N = N1 N2, n = N2 n1 + n2, k = k1 + N1 k2; v[n] = x[P(n)], P(n) = 2 n for n < ceil(N / 2), else 2 (N - 1 - n) + 1 (J.
Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28, 1980). With

    F[k1, n1] = exp(-2 pi i k1 n1 / N1) / sqrt(N1)           T[k1, n2] = exp(-i pi k1 (4 n2 + 1) / 2 N)
    M[k2, n2] = exp(-i pi k2 (4 n2 + 1) / 2 N2) sqrt(2 / N2)

the orthonormal DCT-II is  C x [k1 + N1 k2] = w_k Re sum_n2 M[k2, n2] T[k1, n2] sum_n1 F[k1, n1] v[n1, n2],  w_0 =
sqrt(1 / 2), else w_k = 1; its inverse is the transpose. Real parts and imaginary parts are products of real matrices.
The kernels leave w_k out: it is multiplied into the numbers of the cores (`weight`). Coefficient k is at place k1 N2 +
k2 (`place`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 16
"""The least extent of a product on tensor cores: what is not a multiple of it is padded with zeros."""
_WHOLE = (16, 32, 64, 128, 256)
"""Extents that a tile takes whole; Triton wants powers of two."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One size's transform in one direction.

    whole: the factor that a tile takes whole, a power of two: N2 forward, N1 backward; cut: the other, which programs
    share; padded: `cut`, up to a multiple of `BLOCK`. f, t, m: F, T, M as (2, ..., ...) real and imaginary parts, those
    of T float32: forward f (2, padded, padded), t (2, padded, N2), m (2, N2, N2), transposed; backward f (2, N1, N1), t
    (2, N1, padded), m (2, padded, padded). The imaginary part of m has its sign turned.
    """

    size: int
    whole: int
    cut: int
    padded: int
    f: torch.Tensor
    t: torch.Tensor
    m: torch.Tensor
    inverse: bool

    @property
    def factors(self) -> tuple[int, int]:
        """N1, N2."""
        return (self.whole, self.cut) if self.inverse else (self.cut, self.whole)

    def place(self, k: torch.Tensor) -> torch.Tensor:
        """Where coefficient k is."""
        first, second = self.factors
        return k % first * second + k // first

    @property
    def blocks(self) -> int:
        """Of `BLOCK` places each, of an inverse plan; those of the padding have no coefficients."""
        return self.whole * (self.padded // BLOCK)

    def block_of(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of an inverse plan: in which block coefficient k is, and at which of its places."""
        assert self.inverse
        first, _ = self.factors
        return k % first * (self.padded // BLOCK) + k // first // BLOCK, k // first % BLOCK


def weight(k: torch.Tensor) -> torch.Tensor:
    """w_k, float64."""
    return torch.where(k == 0, math.sqrt(0.5), 1.0).double()


def split(size: int) -> tuple[int, int] | None:
    """(whole, cut) with the fewest multiplications, padding included; None if no power of two from 16 on divides
    `size`."""
    found = [(whole, size // whole) for whole in _WHOLE if size % whole == 0 and size >= 2 * whole]
    return min(found, key=lambda one: _padded(one[1]) * one[0] * (_padded(one[1]) + one[0]), default=None)


def make_plan(size: int, dtype: torch.dtype, device: torch.device, *, inverse: bool) -> Plan | None:
    """None if `size` has no `split`. dtype: of the products' operands."""
    parts = split(size)
    if parts is None:
        return None
    whole, cut = parts
    first, second = (whole, cut) if inverse else (cut, whole)
    n2 = 4 * torch.arange(second, dtype=torch.float64) + 1
    k1, k2 = torch.arange(first, dtype=torch.float64), torch.arange(second, dtype=torch.float64)
    f = _phases(torch.outer(k1, k1) * 2 / first) / math.sqrt(first)
    t = _phases(torch.outer(k1, n2) / (2 * size))
    m = _phases(torch.outer(k2, n2) / (2 * second)) * math.sqrt(2 / second)
    m[1].neg_()
    padded = _padded(cut)
    if inverse:
        t, m = _grown(t, first, padded), _grown(m, padded, padded)
    else:
        f, t, m = _grown(f, padded, padded), _grown(t, padded, second), m.transpose(1, 2)
    ready = [part.to(device, kind).contiguous() for part, kind in ((f, dtype), (t, torch.float32), (m, dtype))]
    return Plan(size, whole, cut, padded, ready[0], ready[1], ready[2], inverse)


def _phases(turns: torch.Tensor) -> torch.Tensor:
    """exp(-i pi turns), as (2, ...)."""
    return torch.stack((torch.cos(math.pi * turns), -torch.sin(math.pi * turns)))


def _grown(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    grown = x.new_zeros(2, rows, columns)
    grown[:, : x.shape[1], : x.shape[2]] = x
    return grown


def _padded(extent: int) -> int:
    return -(-extent // BLOCK) * BLOCK
