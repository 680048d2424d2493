"""A transform of N numbers as products with small matrices, and their tables.

N = N1 N2, n = N2 n1 + n2, k = k1 + N1 k2. For the orthonormal DCT-II, with v[n] = x[P(n)], P(n) = 2 n for n <
ceil(N / 2), else 2 (N - 1 - n) + 1 (J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP
28, 1980),

    F[k1, n1] = exp(-2 pi i k1 n1 / N1) / sqrt(N1)           T[k1, n2] = exp(-i pi k1 (4 n2 + 1) / 2 N)
    M[k2, n2] = exp(-i pi k2 (4 n2 + 1) / 2 N2) sqrt(2 / N2)

    C x [k1 + N1 k2] = w_k Re sum_n2 M[k2, n2] T[k1, n2] sum_n1 F[k1, n1] v[n1, n2],    w_0 = sqrt(1 / 2), else w_k = 1

and for the orthonormal DFT of real numbers, X, its Hartley form H[k] = Re X[k] - Im X[k] (R. N. Bracewell, "Discrete
Hartley transform", J. Opt. Soc. Am. 73, 1983), which is real, symmetric and its own inverse: the same, with v = x, w = 1,

    T[k1, n2] = exp(-2 pi i k1 n2 / N) (1 + i)               M[k2, n2] = exp(-2 pi i k2 n2 / N2) / sqrt(N2)

The inverse of both is the transpose. Real parts and imaginary parts are products of real matrices: two stages, 4 N (N1 +
N2) flops. Long transforms have three: `whole` is `RADIX`^2 then, and the stage of `whole` is done as two of `RADIX`, with
a table of phases between them (`Inner`). Forward n2 = RADIX nb + nc, k2 = kb + RADIX kc:

    M[k2, n2] = G[kc, nc] T'[kb, nc] F'[kb, nb]

with F' the F of `RADIX` and T', G the T and M of N2 = RADIX RADIX (without 1 + i); backward k1 = ka + RADIX kb, n1 =
RADIX na + nb, F[k1, n1] = F'[ka, na] T'[ka, nb] F'[kb, nb], T'[ka, nb] = exp(-2 pi i ka nb / N1).

The kernels leave w_k out: it is multiplied into the numbers of the cores (`Plan.weight`). Where coefficient k lies in
memory (`Plan.place`, `Plan.block_of`) depends on the size alone, so cores are placed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 16
"""The least extent of a product on tensor cores: what is not a multiple of it is padded with zeros."""
RADIX = 16
_WHOLE = (16, 32, 64, 128)
"""Extents that a tile takes whole; Triton wants powers of two."""
_LONG = 8192
"""From here on three stages, where they are possible."""
FrameName: TypeAlias = Literal["dct", "dft"]
Indices = TypeVar("Indices", torch.Tensor, NDArray[np.int64])


@dataclass(frozen=True, slots=True, eq=False)
class Inner:
    """The stage of `whole` as two. f: F' (3, RADIX, RADIX), its real part, its imaginary part, and that with its sign
    turned; t: T' (2, RADIX, RADIX) float32."""

    f: torch.Tensor
    t: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One size's transform in one direction.

    whole: the factor that a tile takes whole, a power of two: N2 forward, N1 backward; cut: the other, which programs
    share; padded: `cut`, up to a multiple of `BLOCK`. f, t, m: F, T, M as (2, ..., ...) real and imaginary parts, those
    of T float32: forward f (2, padded, padded), t (2, padded, N2), m (2, N2, N2), transposed; backward f (2, N1, N1), t
    (2, N1, padded), m (2, padded, padded). The imaginary part of m has its sign turned. inner: of three stages; then m
    forward is G (2, RADIX, RADIX), transposed, and f backward F' (2, RADIX, RADIX).
    """

    size: int
    whole: int
    cut: int
    padded: int
    f: torch.Tensor
    t: torch.Tensor
    m: torch.Tensor
    inverse: bool
    frame: FrameName = "dct"
    inner: Inner | None = None

    @property
    def factors(self) -> tuple[int, int]:
        """N1, N2."""
        return (self.whole, self.cut) if self.inverse else (self.cut, self.whole)

    def place(self, k: Indices) -> Indices:
        """Of a forward plan: where coefficient k is."""
        assert not self.inverse
        first, second = self.factors
        k2 = k // first
        if self.inner is not None:
            k2 = k2 % RADIX * RADIX + k2 // RADIX
        return k % first * second + k2

    @property
    def blocks(self) -> int:
        """Of `BLOCK` places each, of an inverse plan; those of the padding have no coefficients."""
        return self.whole * (self.padded // BLOCK)

    def block_of(self, k: Indices) -> tuple[Indices, Indices]:
        """Of an inverse plan: in which block coefficient k is, and at which of its places. Blocks that a program takes
        together, those of consecutive k1, lie together."""
        assert self.inverse
        first, _ = self.factors
        return k // first // BLOCK * first + k % first, k // first % BLOCK

    def weight(self, k: torch.Tensor) -> torch.Tensor:
        """w_k, float64."""
        return torch.where((k == 0) & (self.frame == "dct"), math.sqrt(0.5), 1.0).double()


def split(size: int) -> tuple[int, int] | None:
    """(whole, cut) with the fewest multiplications, padding included; None if no power of two from 16 on divides
    `size`."""
    if three_stages(size):
        return RADIX * RADIX, size // (RADIX * RADIX)
    found = [(whole, size // whole) for whole in _WHOLE if size % whole == 0 and size >= 2 * whole]
    return min(found, key=lambda one: _padded(one[1]) * one[0] * (_padded(one[1]) + one[0]), default=None)


def three_stages(size: int) -> bool:
    return size >= _LONG and size % (RADIX * RADIX) == 0


def make_plan(
    size: int, dtype: torch.dtype, device: torch.device, *, inverse: bool, frame: FrameName = "dct"
) -> Plan | None:
    """None if `size` has no `split`. dtype: of the products' operands."""
    parts = split(size)
    if parts is None:
        return None
    whole, cut = parts
    padded, three = _padded(cut), three_stages(size)
    first, second = (whole, cut) if inverse else (cut, whole)
    f, t, m = _fourier(first), _turns(first, second, frame), _last(second, frame)
    if frame == "dft":
        t = torch.stack((t[0] - t[1], t[0] + t[1]))
    if inverse:
        t, m = _grown(t, first, padded), _grown(m, padded, padded)
        f = _fourier(RADIX) if three else f
    else:
        f, t = _grown(f, padded, padded), _grown(t, padded, second)
        m = (_last(RADIX, frame) if three else m).transpose(1, 2)

    def ready(part: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return part.to(device, kind).contiguous()

    inner = None
    if three:
        small = _fourier(RADIX)
        between = _turns(RADIX, RADIX, "dft" if inverse else frame)
        inner = Inner(ready(torch.cat((small, -small[1:])), dtype), ready(between, torch.float32))
    tables = ready(f, dtype), ready(t, torch.float32), ready(m, dtype)
    return Plan(size, whole, cut, padded, *tables, inverse, frame, inner)


def _fourier(size: int) -> torch.Tensor:
    """F."""
    k = torch.arange(size, dtype=torch.float64)
    return _phases(torch.outer(k, k) * 2 / size) / math.sqrt(size)


def _turns(first: int, second: int, frame: FrameName) -> torch.Tensor:
    """T, without 1 + i."""
    k1 = torch.arange(first, dtype=torch.float64)
    return _phases(torch.outer(k1, _sampled(second, frame)) / (2 * first * second))


def _last(second: int, frame: FrameName) -> torch.Tensor:
    """M, the sign of its imaginary part turned."""
    k2 = torch.arange(second, dtype=torch.float64)
    m = _phases(torch.outer(k2, _sampled(second, frame)) / (2 * second)) * math.sqrt((1 + (frame == "dct")) / second)
    m[1].neg_()
    return m


def _sampled(second: int, frame: FrameName) -> torch.Tensor:
    return 4 * torch.arange(second, dtype=torch.float64) + (frame == "dct")


def _phases(turns: torch.Tensor) -> torch.Tensor:
    """exp(-i pi turns), as (2, ...)."""
    return torch.stack((torch.cos(math.pi * turns), -torch.sin(math.pi * turns)))


def _grown(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    grown = x.new_zeros(2, rows, columns)
    grown[:, : x.shape[1], : x.shape[2]] = x
    return grown


def _padded(extent: int) -> int:
    return -(-extent // BLOCK) * BLOCK
