"""The slow twins: every operator of this layer by its definition. Tests and benchmarks import them; the server does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from overtone.kernels.cores import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SparseCore,
)
from overtone.kernels.types import Delta, Frame, FrameKind, Term, wavelet_size


def dct_matrix(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """C with C[k, j] = s_k cos(pi (2 j + 1) k / (2 N)): orthonormal DCT-II, row = frequency. Returns (size, size)."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    j = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * j + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix.to(dtype)


def frame_matrix(frame: Frame, size: int, coefficients: int) -> torch.Tensor:
    """F as a dense float64 matrix (m, N): of the analysis, and transposed of the synthesis, which for all kinds but the
    DFTs is the same. For the DFTs see `synthesis_matrix`."""
    kind = frame.kind
    if kind is FrameKind.IDENTITY:
        return torch.eye(size, dtype=torch.float64)
    if kind is FrameKind.DCT:
        return dct_matrix(size)
    if kind is FrameKind.DFT:
        return _dft_matrix(size)
    if frame.shared is not None:
        return frame.shared.matrix[:coefficients, :size].double()
    assert frame.taps is not None, kind
    return _wavelet_matrix(size, frame.taps)


def synthesis_matrix(frame: Frame, size: int, coefficients: int) -> torch.Tensor:
    """What turns coefficients into y, dense, float64: (N, m)."""
    matrix = frame_matrix(frame, size, coefficients)
    if frame.kind is FrameKind.DFT:
        # The inverse for every spectrum: frequencies between the ends stand for themselves and their conjugates, the
        # imaginary parts of the ends for nothing.
        half = size // 2 + 1
        weights = torch.full((half,), 2.0, dtype=torch.float64)
        weights[0] = 1
        if size % 2 == 0:
            weights[-1] = 1
        return (matrix * torch.cat((weights, weights))[:, None]).T
    return matrix.T


def _dft_matrix(size: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.arange(size // 2 + 1)[:, None].double() * torch.arange(size).double() / size
    return torch.cat((torch.cos(angle), -torch.sin(angle))) / math.sqrt(size)


def _wavelet_matrix(size: int, taps: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    half, length = wavelet_size(size, taps) // 2, len(taps[0])
    full = torch.zeros(2 * half, 2 * half + length - 2, dtype=torch.float64)
    for band, filter_taps in enumerate(taps):
        for k in range(half):
            full[band * half + k, 2 * k : 2 * k + length] = torch.tensor(filter_taps, dtype=torch.float64)
    start = (full.shape[1] - size) // 2
    return full[:, start : start + size]


def dct_analyse(x: torch.Tensor) -> torch.Tensor:
    """z = C x along the last axis; computed in float64, returned in x's dtype."""
    return (x.double() @ dct_matrix(x.shape[-1]).T).to(x.dtype)


def dct_synthesise(u: torch.Tensor) -> torch.Tensor:
    """y = C^T u along the last axis; computed in float64, returned in u's dtype."""
    return (u.double() @ dct_matrix(u.shape[-1])).to(u.dtype)


def core_dense(core: Core) -> torch.Tensor:
    """K as a dense float64 matrix of `core.shape`; of a circulant core the whole (p, q) block matrix."""
    if isinstance(core, SparseCore):
        return sparse_dense(core)
    if isinstance(core, LowRankCore):
        return core.scale * core.b.double() @ core.a.double()
    if isinstance(core, DenseCore):
        return core.scale * core.matrix.double()
    if isinstance(core, DiagonalCore):
        return torch.diag(core.values.double())
    if isinstance(core, KroneckerCore):
        return core.scale * torch.kron(core.b.double() @ core.a.double(), core.k.double().T.contiguous())
    if isinstance(core, CirculantCore):
        return core.scale * _circulant_dense(core.kernel.double())
    return _modulated_dense(core)


def _circulant_dense(kernel: torch.Tensor) -> torch.Tensor:
    m, n, b = kernel.shape
    offsets = (torch.arange(b)[None, :] - torch.arange(b)[:, None]) % b  # [u, v] -> (v - u) mod b
    return kernel[:, :, offsets].permute(0, 2, 1, 3).reshape(m * b, n * b)


def _modulated_dense(core: ModulatedCore) -> torch.Tensor:
    (r, nb), n = core.lam.shape, core.gamma.shape[1]
    dense = torch.zeros(r * nb, n, dtype=torch.float64)
    for k in range(r):
        for j in range(nb):
            row = core.gamma[j].double() * core.basis.matrix[k, :n].double()
            dense[k * nb + j] = core.scale * core.lam[k, j].double() * row
    return dense.T if core.transposed else dense


def sparse_dense(core: SparseCore) -> torch.Tensor:
    """K as a dense float64 matrix of `core.shape`; duplicate coordinates add."""
    dense = torch.zeros(core.shape, dtype=torch.float64)
    dense.index_put_((core.rows.long(), core.cols.long()), core.values.double(), accumulate=True)
    return dense


def sparse_apply(z: torch.Tensor, cores: Sequence[SparseCore | None], out_features: int) -> torch.Tensor:
    """u[t] = K_t z[t], token by token; rows whose core is None are zero.

    z: (T, q); cores: T entries of shape (p, q); returns (T, p) in z's dtype, computed in float64.
    """
    u = torch.zeros(z.shape[0], out_features, dtype=torch.float64)
    for t, core in enumerate(cores):
        if core is not None:
            u[t] = sparse_dense(core) @ z[t].double()
    return u.to(z.dtype)


def dense_term(term: Term, shape: tuple[int, int], weight: torch.Tensor | None = None) -> torch.Tensor:
    """diag(g) S^T K A as a dense float64 matrix (p, q). weight: (p, q), the layer's, for the frame WEIGHT."""
    p, q = shape
    core = core_dense(term.core)
    if term.analysis.kind is FrameKind.WEIGHT:
        assert weight is not None
        core = core @ weight.double()
    elif term.analysis.kind is not FrameKind.BLOCK_DFT:  # of which `core_dense` has taken both transforms already
        core = core @ frame_matrix(term.analysis, q, core.shape[1])
    if term.synthesis.kind is not FrameKind.BLOCK_DFT:
        core = synthesis_matrix(term.synthesis, p, core.shape[0]) @ core
    return core if term.gain is None else term.gain.double()[:, None] * core


def dense_delta(delta: Delta, weight: torch.Tensor | None = None) -> torch.Tensor:
    """delta_W as a dense float64 matrix (p, q). weight: (p, q), the layer's, for terms with the frame WEIGHT."""
    total = torch.zeros(delta.shape, dtype=torch.float64)
    for term in delta.terms:
        total += dense_term(term, delta.shape, weight)
    return total
