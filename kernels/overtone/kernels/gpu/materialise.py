"""out = addend + S^T K A: a sparse core between cosine or Fourier frames as a dense matrix, for an adapter that is merged.

    R[i, j] = sum over the entries e of row i of K of  values[e] a(cols[e], j)           A[c, j] = a(c, j)
    out[n, j] = addend[n, j] + sum over i of  s(rows[i], n) R[i, j]                       S[c, n] = s(c, n)

The sums are over the rows of K that are not empty: n entries cost 2 min(n, p) p q operations, on tensor cores. A frame's
numbers are cosines of exact multiples of 2 pi / period, so they are read from a table of one period (`Waves`), and no
basis is ever in memory. No atomics: each number belongs to one program, and its sum has one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.sparse import CsrCore
from overtone.kernels.types import Frame, FrameKind


@dataclass(frozen=True, slots=True, eq=False)
class Waves:
    """A frame of N numbers, DCT or DFT (`overtone.kernels.types.FrameKind`), but for each coefficient's weight:

        DCT: sqrt(2 / N) cos(2 pi (2 n + 1) c / 4 N)
        DFT: sqrt(2 / N) cos(2 pi n c / N) for c < h = N // 2 + 1, else -sqrt(2 / N) sin(2 pi n (c - h) / N)

    table: float32, one period of the cosine; for the DFT one of -sin behind it.
    """

    size: int
    fourier: bool
    table: torch.Tensor

    @property
    def wide(self) -> bool:
        """Whether a phase times a coefficient may need more than 31 bits; with a tile's outputs beyond the last."""
        return 2 * (self.size + 256) * self.size >= 2**31

    def weights(self, coefficients: torch.Tensor, *, synthesis: bool) -> torch.Tensor:
        """float32. The synthesis of the DFT is the inverse for every spectrum: what is not at the ends counts twice."""
        c, half = coefficients.long(), self.size // 2 + 1
        if not self.fourier:
            return torch.where(c == 0, math.sqrt(0.5), 1.0)
        k = c % half
        twice = (k > 0) & (2 * k != self.size) if synthesis else torch.zeros_like(k, dtype=torch.bool)
        return torch.where(twice, 2.0, 1.0) * math.sqrt(0.5)


def has_waves(frame: Frame) -> bool:
    return frame.kind in (FrameKind.DCT, FrameKind.DFT)


def waves(frame: Frame, size: int, device: torch.device) -> Waves:
    fourier = frame.kind is FrameKind.DFT
    period = size if fourier else 4 * size
    angle = 2 * math.pi * torch.arange(period, dtype=torch.float64) / period
    table = torch.cat((torch.cos(angle), -torch.sin(angle))) if fourier else torch.cos(angle)
    return Waves(size, fourier, table.to(device, torch.float32))


@dataclass(frozen=True, slots=True, eq=False)
class FilledRows:
    """The rows of a core that are not empty. rows: (m,) int64, ascending; pointers: (m + 1,) int32, where the entries of
    each begin; cols: (n,) int32; values: (n,) float32, the frames' weights multiplied in, divided by the largest of the
    core's; scale: () float32, that one."""

    rows: torch.Tensor
    pointers: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor


def filled_rows(core: CsrCore, analysis: Waves, synthesis: Waves) -> FilledRows:
    """On the core's device. Waits for it: how many rows there are is not known before."""
    rows, counts = torch.unique_consecutive(core.rows.long(), return_counts=True)
    pointers = torch.zeros(len(rows) + 1, dtype=torch.int32, device=rows.device)
    pointers[1:] = counts.cumsum(0)
    largest = core.values.abs().amax() if core.values.numel() else core.values.new_zeros(())
    scale = largest.clamp(min=1e-30)
    weights = analysis.weights(core.cols, synthesis=False) * synthesis.weights(core.rows, synthesis=True)
    return FilledRows(rows, pointers, core.cols, core.values / scale * weights, scale)


@dataclass(frozen=True, slots=True)
class MaterialiseConfig:
    """block_j: of a row of R, of a program; block_p, block_q: of the matrix, of a program; block_m: rows of R at once."""

    block_j: int = 1024
    block_p: int = 128
    block_q: int = 128
    block_m: int = 32
    warps: int = 8


def materialise(
    core: FilledRows, analysis: Waves, synthesis: Waves, between: torch.Tensor, addend: torch.Tensor | None,
    out: torch.Tensor, config: MaterialiseConfig,
) -> None:  # fmt: skip
    """between: (m, q), contiguous, for R, its dtype the products' operands'; addend: (p, q) or None for zeros, which may be
    `out`; out: (p, q), of any floating dtype, rounded once; the last dimension of both contiguous."""
    (p, q), m = out.shape, len(core.rows)
    assert (p, q) == (synthesis.size, analysis.size)
    assert between.shape == (m, q)
    assert between.is_contiguous()
    assert out.stride(1) == 1
    if m:
        _between[m, triton.cdiv(q, config.block_j)](
            core.pointers, core.cols, core.values, analysis.table, between,
            SIZE=q, FOURIER=analysis.fourier, WIDE=analysis.wide, BLOCK_J=config.block_j, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    addend_stride = 0
    if addend is not None:
        assert addend.shape == out.shape
        assert addend.stride(1) == 1
        addend_stride = addend.stride(0)
    _materialise[triton.cdiv(p, config.block_p), triton.cdiv(q, config.block_q)](
        core.rows, between, synthesis.table, core.scale, out if addend is None else addend, out, m, q,
        2 / math.sqrt(p * q), addend_stride, out.stride(0), SIZE=p, FOURIER=synthesis.fourier, WIDE=synthesis.wide,
        ADDEND=addend is not None, BLOCK_P=config.block_p, BLOCK_Q=config.block_q, BLOCK_M=config.block_m,
        num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _wave(table_ptr, c, n, SIZE: tl.constexpr, FOURIER: tl.constexpr, WIDE: tl.constexpr):
    """cos or -sin of coefficients c at n, any shapes that go together."""
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    c, n = c.to(kind), n.to(kind)
    if FOURIER:
        half: tl.constexpr = SIZE // 2 + 1
        at = (c % half) * n % SIZE + c // half * SIZE
    else:
        at = c * (2 * n + 1) % (4 * SIZE)
    return tl.load(table_ptr + at)


@triton.jit
def _between(
    pointers_ptr,
    cols_ptr,
    values_ptr,
    table_ptr,
    r_ptr,
    SIZE: tl.constexpr,
    FOURIER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = tl.zeros((BLOCK_J,), tl.float32)
    for e in range(tl.load(pointers_ptr + i), tl.load(pointers_ptr + i + 1)):
        sums += tl.load(values_ptr + e) * _wave(table_ptr, tl.load(cols_ptr + e), j, SIZE, FOURIER, WIDE)
    tl.store(r_ptr + i.to(tl.int64) * SIZE + j, sums.to(r_ptr.dtype.element_ty), mask=j < SIZE)


@triton.jit(do_not_specialize=["m"])
def _materialise(
    rows_ptr,
    r_ptr,
    table_ptr,
    scale_ptr,
    addend_ptr,
    out_ptr,
    m,
    q,
    weight,
    addend_stride,
    out_stride,
    SIZE: tl.constexpr,
    FOURIER: tl.constexpr,
    WIDE: tl.constexpr,
    ADDEND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    operand = r_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for begin in range(0, m, BLOCK_M):
        i = begin + tl.arange(0, BLOCK_M)
        # What is beyond the rows is coefficient 0 times nothing.
        c = tl.load(rows_ptr + i, mask=i < m, other=0)
        s = _wave(table_ptr, c[None, :], n[:, None], SIZE, FOURIER, WIDE).to(operand)
        real = (i < m)[:, None] & (j < q)[None, :]
        r = tl.load(r_ptr + i.to(tl.int64)[:, None] * q + j[None, :], mask=real, other=0.0)
        sums = tl.dot(s, r, sums, input_precision="ieee")
    inside = (n < SIZE)[:, None] & (j < q)[None, :]
    found = sums * (weight * tl.load(scale_ptr))
    if ADDEND:
        at = addend_ptr + n.to(tl.int64)[:, None] * addend_stride + j[None, :]
        found += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + n.to(tl.int64)[:, None] * out_stride + j[None, :]
    tl.store(to, found.to(out_ptr.dtype.element_ty), mask=inside)
