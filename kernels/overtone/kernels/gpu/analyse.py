"""z[t] = C x[rows[t]]: the transform of the rows that have an adapter.

    Ar + i Ai = F v        Br + i Bi = T (Ar + i Ai)        z = Br Re M - Bi Im M

with the numbers of `overtone.kernels.gpu.plans`, the last product in two stages where the plan has three; coefficient k of
z is at its place there, without its weight. A program computes BLOCK_T rows times BLOCK_K of the first factor; programs
none of whose rows has an adapter end at once. A row's numbers do not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import Rows
from overtone.kernels.gpu.order import source
from overtone.kernels.gpu.plans import BLOCK, Plan
from overtone.kernels.gpu.three_stage import inner_forward


@dataclass(frozen=True, slots=True)
class AnalyseConfig:
    """block_t: rows of a program; block_k: of the first factor's outputs; block_n: of its inputs at once."""

    block_t: int = 1
    block_k: int = BLOCK
    block_n: int = BLOCK
    warps: int = 4


def analyse(plan: Plan, x: torch.Tensor, batch: Rows, z: torch.Tensor, config: AnalyseConfig) -> None:
    """x: (n, N), its last dimension contiguous; z: (T, N), contiguous, float32 or narrower; its rows of rows without an
    adapter are left as they are."""
    assert z.shape == (len(batch.rows), plan.size)
    assert len(batch.rows) == len(batch.directories)
    launch(plan, x, batch.rows, batch.directories, z, config, together=1)


def launch(
    plan: Plan,
    x: torch.Tensor,
    rows: torch.Tensor,
    directories: torch.Tensor,
    z: torch.Tensor,
    config: AnalyseConfig,
    *,
    together: int,
) -> None:
    """together: consecutive rows that share a directory and whose numbers are side by side in z; 1: one."""
    assert not plan.inverse
    assert x.shape[1] == plan.size
    assert x.stride(1) == 1
    assert z.is_contiguous()
    assert rows.is_contiguous()
    assert plan.padded % config.block_k == plan.padded % config.block_n == 0
    assert together == 1 or together % config.block_t == 0
    tokens = rows.numel()
    if not tokens:
        return
    f, t = (plan.f, plan.t) if plan.inner is None else (plan.inner.f, plan.inner.t)
    _analyse[triton.cdiv(tokens, config.block_t), plan.padded // config.block_k](
        x, rows, directories, plan.f, plan.t, plan.m, f, t, z, tokens, x.stride(0), plan.size, plan.cut, plan.padded,
        N2=plan.whole, DCT=plan.frame == "dct", THREE=plan.inner is not None, TOGETHER=together, BLOCK_T=config.block_t,
        BLOCK_K=config.block_k, BLOCK_N=config.block_n, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "cut"])
def _analyse(
    x_ptr,
    rows_ptr,
    directories_ptr,
    f_ptr,
    t_ptr,
    m_ptr,
    inner_f_ptr,
    inner_t_ptr,
    z_ptr,
    tokens,
    x_stride,
    size,
    cut,
    padded,
    N2: tl.constexpr,
    DCT: tl.constexpr,
    THREE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_T
    k1 = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_T * N2)  # of a row, its n2
    token, n2 = first + column // N2, column % N2
    # Rows of one directory are asked for it once; what is loaded once is a number, not a tensor of one.
    if TOGETHER > 1 or BLOCK_T == 1:
        if tl.load(directories_ptr + first // TOGETHER) < 0:
            return
        there = token < tokens
    else:
        each = first + tl.arange(0, BLOCK_T)
        if tl.max(tl.load(directories_ptr + each, mask=each < tokens, other=-1), 0) < 0:
            return
        there = tl.load(directories_ptr + token, mask=token < tokens, other=-1) >= 0
    if BLOCK_T == 1:
        row = tl.load(rows_ptr + first)
        row_at = tl.maximum(row, 0) * x_stride + tl.zeros((N2,), tl.int64)
    else:
        row = tl.load(rows_ptr + token, mask=token < tokens, other=-1)
        row_at = tl.maximum(row, 0) * x_stride
    there = there & (row >= 0)
    operand = f_ptr.dtype.element_ty
    a_re = tl.zeros((BLOCK_K, BLOCK_T * N2), tl.float32)
    a_im = tl.zeros((BLOCK_K, BLOCK_T * N2), tl.float32)
    for begin in range(0, padded, BLOCK_N):
        n1 = begin + tl.arange(0, BLOCK_N)
        n = n1[:, None] * N2 + n2[None, :]
        inside = (n < size) & there[None, :]
        v = tl.load(x_ptr + row_at[None, :] + source(n, size, DCT), mask=inside, other=0.0).to(operand)
        f_at = f_ptr + k1[:, None] * padded + n1[None, :]
        a_re = tl.dot(tl.load(f_at), v, a_re, input_precision="ieee")
        a_im = tl.dot(tl.load(f_at + padded * padded), v, a_im, input_precision="ieee")
    t_at = t_ptr + k1[:, None] * N2 + n2[None, :]
    t_re, t_im = tl.load(t_at), tl.load(t_at + padded * N2)
    b_re, b_im = (t_re * a_re - t_im * a_im).to(operand), (t_re * a_im + t_im * a_re).to(operand)
    if THREE:
        z = inner_forward(b_re, b_im, inner_f_ptr, inner_t_ptr, m_ptr, BLOCK_K, BLOCK_T)
        z = tl.trans(z)  # a row is one token's k1 and kb
        at = tl.arange(0, BLOCK_K * BLOCK_T * 16)
        of_token, of_k1 = first + at // 16 % BLOCK_T, tl.program_id(1) * BLOCK_K + at // (16 * BLOCK_T)
        place = (of_k1 * N2 + at % 16 * 16)[:, None] + tl.arange(0, 16)[None, :]
    else:
        # (k1, token, n2): a row of the second product is one token's k1.
        k2 = tl.arange(0, N2)
        m_at = m_ptr + k2[:, None] * N2 + k2[None, :]
        z = tl.dot(tl.reshape(b_re, (BLOCK_K * BLOCK_T, N2)), tl.load(m_at), input_precision="ieee")
        b_im = tl.reshape(b_im, (BLOCK_K * BLOCK_T, N2))
        z = tl.dot(b_im, tl.load(m_at + N2 * N2), z, input_precision="ieee")
        at = tl.arange(0, BLOCK_K * BLOCK_T)
        of_token, of_k1 = first + at % BLOCK_T, tl.program_id(1) * BLOCK_K + at // BLOCK_T
        place = (of_k1 * N2)[:, None] + k2[None, :]
    if TOGETHER > 1 or BLOCK_T == 1:
        owned = of_k1 < cut
    else:
        owned = (of_k1 < cut) & (tl.load(directories_ptr + of_token, mask=of_token < tokens, other=-1) >= 0)
    to = (of_token // TOGETHER).to(tl.int64) * TOGETHER * size + of_token % TOGETHER
    z_at = z_ptr + to[:, None] + place * TOGETHER
    tl.store(z_at, z.to(z_ptr.dtype.element_ty), mask=owned[:, None])
