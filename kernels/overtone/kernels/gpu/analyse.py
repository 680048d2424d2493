"""z[t] = C x[rows[t]]: the cosine transform of the rows that have an adapter.

    Ar + i Ai = F v        Br + i Bi = T (Ar + i Ai)        z = Br Re M - Bi Im M

with the numbers of `overtone.kernels.gpu.plans`; coefficient k of z is at its place there, without its weight. A
program computes BLOCK_T rows times BLOCK_K of the first factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.order import source
from overtone.kernels.gpu.plans import BLOCK, Plan


@dataclass(frozen=True, slots=True)
class AnalyseConfig:
    """block_t: rows of a program; block_k: of the first factor's outputs; block_n: of its inputs at once."""

    block_t: int = 1
    block_k: int = BLOCK
    block_n: int = BLOCK
    warps: int = 4


def analyse(plan: Plan, x: torch.Tensor, rows: torch.Tensor, z: torch.Tensor, config: AnalyseConfig) -> None:
    """x: (n, N), its last dimension contiguous; rows: (T,) int64; z: (T, N), contiguous, float32 or narrower."""
    assert not plan.inverse
    assert x.shape[1] == z.shape[1] == plan.size
    assert x.stride(1) == 1
    assert z.is_contiguous()
    assert len(rows) == len(z)
    assert plan.padded % config.block_k == plan.padded % config.block_n == 0
    if not len(z):
        return
    grid = (triton.cdiv(len(z), config.block_t), plan.padded // config.block_k)
    _analyse[grid](
        x,
        rows,
        plan.f,
        plan.t,
        plan.m,
        z,
        len(z),
        x.stride(0),
        SIZE=plan.size,
        N1=plan.cut,
        N2=plan.whole,
        PADDED=plan.padded,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


@triton.jit
def _analyse(
    x_ptr,
    rows_ptr,
    f_ptr,
    t_ptr,
    m_ptr,
    z_ptr,
    tokens,
    x_stride,
    SIZE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_T
    k1 = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_T * N2)  # of a row, its n2
    token, n2 = first + column // N2, column % N2
    there = token < tokens
    row_at = tl.load(rows_ptr + token, mask=there, other=0) * x_stride
    operand = f_ptr.dtype.element_ty
    a_re = tl.zeros((BLOCK_K, BLOCK_T * N2), tl.float32)
    a_im = tl.zeros((BLOCK_K, BLOCK_T * N2), tl.float32)
    for begin in range(0, PADDED, BLOCK_N):
        n1 = begin + tl.arange(0, BLOCK_N)
        n = n1[:, None] * N2 + n2[None, :]
        v = tl.load(x_ptr + row_at[None, :] + source(n, SIZE), mask=(n < SIZE) & there[None, :], other=0.0).to(operand)
        f_at = f_ptr + k1[:, None] * PADDED + n1[None, :]
        a_re = tl.dot(tl.load(f_at), v, a_re, input_precision="ieee")
        a_im = tl.dot(tl.load(f_at + PADDED * PADDED), v, a_im, input_precision="ieee")
    t_at = t_ptr + k1[:, None] * N2 + n2[None, :]
    t_re, t_im = tl.load(t_at), tl.load(t_at + PADDED * N2)
    # (k1, token, n2): a row of the second product is one token's k1.
    b_re = tl.reshape((t_re * a_re - t_im * a_im).to(operand), (BLOCK_K * BLOCK_T, N2))
    b_im = tl.reshape((t_re * a_im + t_im * a_re).to(operand), (BLOCK_K * BLOCK_T, N2))
    k2 = tl.arange(0, N2)
    m_at = m_ptr + k2[:, None] * N2 + k2[None, :]
    z = tl.dot(b_re, tl.load(m_at), input_precision="ieee")
    z = tl.dot(b_im, tl.load(m_at + N2 * N2), z, input_precision="ieee")
    row = tl.arange(0, BLOCK_K * BLOCK_T)
    of_k1, of_token = tl.program_id(1) * BLOCK_K + row // BLOCK_T, first + row % BLOCK_T
    to = of_token.to(tl.int64)[:, None] * SIZE + of_k1[:, None] * N2 + k2[None, :]
    tl.store(z_ptr + to, z.to(z_ptr.dtype.element_ty), mask=(of_token[:, None] < tokens) & (of_k1[:, None] < N1))
