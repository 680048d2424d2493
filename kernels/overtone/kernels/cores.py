"""Cores: what one adapter owns, a linear map K: (m_out, m_in) between the coefficients of two frames.

Tensors are kept in the precision in which they were stored; whatever is computed with them is computed in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SharedMatrix:
    """A matrix that many adapters use, equal to others by `key`: equal keys must mean equal leading rows and columns.

    matrix: (m, N) float32.
    """

    key: str
    matrix: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedMatrix) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SparsePattern:
    """Where a sparse core is not zero: unique coordinates, sorted by (row, col).

    rows, cols: (n,) int32 with 0 <= rows < shape[0] and 0 <= cols < shape[1]; key: not empty if many adapters share this
    pattern, and then equal patterns have equal keys.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]
    key: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SparseCore:
    """K[rows[i], cols[i]] = values[i]. values: (n,) float32, any scale folded in."""

    pattern: SparsePattern
    values: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        return self.pattern.rows

    @property
    def cols(self) -> torch.Tensor:
        return self.pattern.cols

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def nnz(self) -> int:
        return int(self.values.numel())


@dataclass(frozen=True, slots=True, eq=False)
class LowRankCore:
    """K = scale b a. a: (r, q), b: (p, r) floating point."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class DenseCore:
    """K = scale matrix. matrix: (m_out, m_in) floating point."""

    matrix: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalCore:
    """K = diag(values). values: (m,) floating point."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.numel(), self.values.numel()


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerCore:
    """K = scale (b a) kron k^T: K[i d + v, j d + u] = scale sum_r b[i, r] a[r, j] k[u, v].

    a: (R, q / d), b: (p / d, R), k: (d, d) floating point.
    """

    a: torch.Tensor
    b: torch.Tensor
    k: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        size = self.k.shape[0]
        return self.b.shape[0] * size, self.a.shape[1] * size


@dataclass(frozen=True, slots=True, eq=False)
class CirculantCore:
    """Blocks of circulant matrices, between frames BLOCK_DFT: y_i[u] = scale sum over j, v of w[i, j, (v - u) mod b] x_j[v].

    kernel: (p / b, q / b, b) floating point, w in the equation. In the frame this is a matrix of (p / b, q / b) at each
    frequency; `shape` counts blocks.
    """

    kernel: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernel.shape[0], self.kernel.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class ModulatedCore:
    """Many small bases out of one shared basis A: (r, n), each modulated by a row of gamma and weighted by a column of lam.

    With f = k nb + j for k < r, j < nb:

        K[f, i] = scale lam[k, j] gamma[j, i] A[k, i]        (r nb, n), or its transpose (n, r nb) if `transposed`

    basis: (r, >= n), of which the first n columns are used; gamma: (nb, n), lam: (r, nb) floating point.
    """

    basis: SharedMatrix
    gamma: torch.Tensor
    lam: torch.Tensor
    scale: float = 1.0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        many, n = self.lam.numel(), self.gamma.shape[1]
        return (n, many) if self.transposed else (many, n)


Core: TypeAlias = SparseCore | LowRankCore | DenseCore | DiagonalCore | KroneckerCore | CirculantCore | ModulatedCore


def sparse_pattern(
    rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int], key: str = ""
) -> tuple[SparsePattern, torch.Tensor]:
    """A pattern of coordinates in any order, and for each of them its place in the pattern: (n,) int64.

    rows, cols: (n,) integer within `shape`.
    """
    p, q = shape
    assert rows.shape == cols.shape
    assert rows.ndim == 1
    flat = rows.to(torch.int64) * q + cols.to(torch.int64)
    assert flat.numel() == 0 or (int(flat.min()) >= 0 and int(flat.max()) < p * q)
    unique, places = torch.unique(flat, sorted=True, return_inverse=True)
    return SparsePattern((unique // q).to(torch.int32), (unique % q).to(torch.int32), shape, key), places


def sparse_core(rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> SparseCore:
    """A `SparseCore` from coordinates in any order; duplicates add, in float64.

    rows, cols: (n,) integer within `shape`; values: (n,) floating point.
    """
    assert rows.shape == values.shape
    pattern, places = sparse_pattern(rows, cols, shape)
    summed = torch.zeros(pattern.rows.numel(), dtype=torch.float64).index_add_(0, places, values.to(torch.float64))
    return SparseCore(pattern, summed.to(torch.float32))


_NUMBERS: dict[type, dict[str, int]] = {
    SparseCore: {"values": 1},
    LowRankCore: {"a": 2, "b": 2},
    DenseCore: {"matrix": 2},
    DiagonalCore: {"values": 1},
    KroneckerCore: {"a": 2, "b": 2, "k": 2},
    CirculantCore: {"kernel": 3},
    ModulatedCore: {"gamma": 2, "lam": 2},
}


def numbers_of(core: Core) -> dict[str, torch.Tensor]:
    """The floating-point tensors that the adapter owns, by field name."""
    return {name: getattr(core, name) for name in _NUMBERS[type(core)]}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is infinite or NaN, in one pass: the largest magnitude is what any of them makes of it."""
    return tensor.numel() == 0 or math.isfinite(tensor.abs().max().item())


def sound(core: Core) -> bool:
    """`well_formed`, and all its numbers are finite in float32."""
    return well_formed(core) and all(map(all_finite, numbers_of(core).values()))


def well_formed(core: Core) -> bool:
    """Whether the promises of the core's class hold, whatever its numbers are.

    Of a pattern that others share only the length is looked at here: see `sound_pattern`.
    """
    for name, dimensions in _NUMBERS[type(core)].items():
        tensor = getattr(core, name)
        if tensor.dtype not in _FLOATS or tensor.ndim != dimensions or tensor.numel() == 0:
            return False
    if isinstance(core, SparseCore):
        fits = core.values.dtype == torch.float32 and core.values.shape == core.rows.shape
        return fits and (bool(core.pattern.key) or sound_pattern(core.pattern))
    if isinstance(core, LowRankCore):
        return core.a.shape[0] == core.b.shape[1]
    if isinstance(core, KroneckerCore):
        return core.k.shape[0] == core.k.shape[1] and core.a.shape[0] == core.b.shape[1]
    if isinstance(core, ModulatedCore):
        r, columns = core.basis.matrix.shape
        return core.gamma.shape[0] == core.lam.shape[1] and r == core.lam.shape[0] and columns >= core.gamma.shape[1]
    return True


def sound_pattern(pattern: SparsePattern) -> bool:
    """Whether the coordinates are unique, sorted and within the shape."""
    (p, q), rows, cols = pattern.shape, pattern.rows, pattern.cols
    if (rows.dtype, cols.dtype) != (torch.int32, torch.int32) or rows.ndim != 1 or rows.shape != cols.shape:
        return False
    flat = rows.to(torch.int64) * q + cols
    inside = (rows >= 0) & (rows < p) & (cols >= 0) & (cols < q)
    return bool(inside.all()) and bool((flat[1:] > flat[:-1]).all())
