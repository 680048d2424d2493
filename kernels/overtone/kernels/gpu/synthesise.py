"""y[rows[t]] += C^T K z[t], K the core of the row's adapter: core, inverse transform and sum in one kernel.

    u = K z                                     Br = u Re M, Bi = -u Im M
    Ar = Tr Br + Ti Bi, Ai = Tr Bi - Ti Br      v = Re F^T Ar + Im F^T Ai

with the numbers of `overtone.kernels.gpu.plans`. A program adds to one row BLOCK_N times the first factor of numbers;
it gathers u, a tile after another, straight into the operand of the first product, so u is never in memory. No atomics:
each number of y belongs to one program, and its sum has one order. Layers of one shape that share z (k and v, gate and
up) are one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import Layers, Rows
from overtone.kernels.gpu.order import source
from overtone.kernels.gpu.plans import BLOCK, Plan
from overtone.kernels.gpu.pool import CorePool


@dataclass(frozen=True, slots=True)
class SynthesiseConfig:
    """block_c: of the first factor's coefficients at once, or all of them; block_k: of the second's; block_n: of its
    outputs, of a program."""

    block_c: int = BLOCK
    block_k: int = BLOCK
    block_n: int = BLOCK
    warps: int = 4


def add_synthesis(
    plan: Plan, z: torch.Tensor, batch: Rows, pool: CorePool, layers: Layers, y: torch.Tensor, config: SynthesiseConfig
) -> None:
    """z: (T, q) as `analyse` leaves it; layers: all of the plan's size; y: (n, ...) the outputs of all layers side by
    side, its last dimension contiguous."""
    assert plan.inverse
    if not len(z) or not len(layers.slots):
        return
    assert layers.widest == plan.size
    assert plan.padded % config.block_n == plan.padded % config.block_k == 0
    assert len(z) == len(batch.rows) == len(batch.owners)
    assert z.is_contiguous()
    assert y.stride(1) == 1
    grid = (len(z), plan.padded // config.block_n, len(layers.slots))
    _add_synthesis[grid](
        z,
        y,
        batch.rows,
        batch.owners,
        pool.table,
        pool.starts,
        pool.cols,
        pool.values,
        layers.slots,
        layers.columns,
        plan.f,
        plan.t,
        plan.m,
        z.shape[1],
        y.stride(0),
        pool.table.shape[1],
        SIZE=plan.size,
        M1=plan.whole,
        M2=plan.cut,
        PADDED=plan.padded,
        BLOCK_C=min(config.block_c, plan.whole),
        BLOCK_K=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


@triton.jit
def _add_synthesis(
    z_ptr,
    y_ptr,
    rows_ptr,
    owners_ptr,
    table_ptr,
    starts_ptr,
    cols_ptr,
    values_ptr,
    slots_ptr,
    columns_ptr,
    f_ptr,
    t_ptr,
    m_ptr,
    inputs,
    y_stride,
    slots,
    SIZE: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token, layer = tl.program_id(0), tl.program_id(2)
    owner = tl.load(owners_ptr + token)
    if owner < 0:
        return
    entry = table_ptr + (owner.to(tl.int64) * slots + tl.load(slots_ptr + layer)) * 2
    starts = tl.load(entry)
    if starts < 0:
        return
    first = tl.load(entry + 1)
    z_row = z_ptr + token.to(tl.int64) * inputs
    n2 = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n1 = tl.arange(0, M1)
    operand = f_ptr.dtype.element_ty
    v = tl.zeros((M1, BLOCK_N), tl.float32)
    for c in range(0, M1, BLOCK_C):
        k1 = c + tl.arange(0, BLOCK_C)
        b_re = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        b_im = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for d in range(0, PADDED, BLOCK_K):
            k2 = d + tl.arange(0, BLOCK_K)
            place = k1[:, None] * M2 + k2[None, :]
            real = k2[None, :] < M2
            low = tl.load(starts_ptr + starts + place, mask=real, other=0)
            high = tl.load(starts_ptr + starts + place + 1, mask=real, other=0)
            longest = tl.max(tl.max(high - low, 1), 0)
            u = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
            for j in range(0, longest):
                has = low + j < high
                col = tl.load(cols_ptr + first + low + j, mask=has, other=0).to(tl.int32)
                has = has & (col >= 0) & (col < inputs)
                value = tl.load(values_ptr + first + low + j, mask=has, other=0.0).to(tl.float32)
                u += value * tl.load(z_row + col, mask=has, other=0.0).to(tl.float32)
            m_at = m_ptr + k2[:, None] * PADDED + n2[None, :]
            b_re = tl.dot(u.to(operand), tl.load(m_at), b_re, input_precision="ieee")
            b_im = tl.dot(u.to(operand), tl.load(m_at + PADDED * PADDED), b_im, input_precision="ieee")
        t_at = t_ptr + k1[:, None] * PADDED + n2[None, :]
        t_re, t_im = tl.load(t_at), tl.load(t_at + M1 * PADDED)
        f_at = f_ptr + n1[:, None] * M1 + k1[None, :]
        v = tl.dot(tl.load(f_at), (t_re * b_re + t_im * b_im).to(operand), v, input_precision="ieee")
        v = tl.dot(tl.load(f_at + M1 * M1), (t_re * b_im - t_im * b_re).to(operand), v, input_precision="ieee")
    n = n1[:, None] * M2 + n2[None, :]
    y_at = y_ptr + tl.load(rows_ptr + token) * y_stride + tl.load(columns_ptr + layer) + source(n, SIZE)
    inside = (n2 < M2)[None, :]
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (y + v).to(y_ptr.dtype.element_ty), mask=inside)
