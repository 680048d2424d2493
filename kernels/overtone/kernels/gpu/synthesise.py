"""y[rows[t]] += C^T K z[t], K the core of the row's adapter: core, inverse transform and sum in one kernel.

    u = K z                                     Br = u Re M, Bi = -u Im M
    Ar = Tr Br + Ti Bi, Ai = Tr Bi - Ti Br      v = Re F^T Ar + Im F^T Ai

with the numbers of `overtone.kernels.gpu.plans`, the last product in two stages where the plan has three. A program adds
to one row BLOCK_N times the first factor of numbers; it gathers u, a tile after another, straight into the operand of the
first product, so u is never in memory. No atomics: each number of y belongs to one program, and its sum has one order.
Layers of one shape that share z (k and v, gate and up) are one launch; rows without an adapter and slots without a record
end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import Layers, Rows, Words
from overtone.kernels.gpu.core import gathered, record_at
from overtone.kernels.gpu.order import source
from overtone.kernels.gpu.plans import BLOCK, Plan
from overtone.kernels.gpu.three_stage import inner_inverse


@dataclass(frozen=True, slots=True)
class SynthesiseConfig:
    """block_c: of the first factor's coefficients at once, or all of them, as always where the plan has three stages;
    block_j: of each block's entries at once; block_n: of the second factor's outputs, of a program."""

    block_c: int = BLOCK
    block_j: int = 4
    block_n: int = BLOCK
    warps: int = 4


def add_synthesis(
    plan: Plan, z: torch.Tensor, batch: Rows, words: Words, layers: Layers, y: torch.Tensor, config: SynthesiseConfig
) -> None:
    """z: (T, q) as `analyse` leaves it; words: of the arena, whose directories `batch` has, of spectral records; layers:
    all of the plan's size; y: (n, ...) the outputs of all layers side by side, its last dimension contiguous."""
    assert plan.inverse
    if not len(z) or not len(layers.slots):
        return
    assert layers.widest == plan.size
    assert plan.padded % config.block_n == 0
    assert len(z) == len(batch.rows) == len(batch.directories)
    assert z.is_contiguous()
    assert y.stride(1) == 1
    _add_synthesis[len(z), plan.padded // config.block_n, len(layers.slots)](
        z, y, batch.rows, batch.directories, words.words, words.shorts, words.octets, words.values, layers.slots,
        layers.columns, *tables(plan), z.shape[1], y.stride(0), plan.size, plan.cut, plan.padded,
        M1=plan.whole, DCT=plan.frame == "dct", THREE=plan.inner is not None,
        BLOCK_C=plan.whole if plan.inner is not None else min(config.block_c, plan.whole),
        BLOCK_J=config.block_j, BLOCK_N=config.block_n, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


def tables(plan: Plan) -> tuple[torch.Tensor, ...]:
    """F or F', T, M, T'; of two stages T once more."""
    f, t = (plan.f, plan.t) if plan.inner is None else (plan.inner.f, plan.inner.t)
    return f, plan.t, plan.m, t


@triton.jit(do_not_specialize=["cut"])
def _add_synthesis(
    z_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    shorts_ptr,
    octets_ptr,
    values_ptr,
    slots_ptr,
    columns_ptr,
    f_ptr,
    t_ptr,
    m_ptr,
    inner_t_ptr,
    inputs,
    y_stride,
    size,
    cut,
    padded,
    M1: tl.constexpr,
    DCT: tl.constexpr,
    THREE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token, layer = tl.program_id(0), tl.program_id(2)
    directory = tl.load(directories_ptr + token)
    if directory < 0:
        return
    record = record_at(words_ptr, directory, tl.load(slots_ptr + layer))
    if record == directory:
        return
    z_row = z_ptr + token.to(tl.int64) * inputs
    n2 = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    values: tl.constexpr = 32 // values_ptr.dtype.element_ty.primitive_bitwidth
    v = tl.zeros((M1, BLOCK_N), tl.float32)
    for c in range(0, M1, BLOCK_C):
        k1 = c + tl.arange(0, BLOCK_C)
        b_re = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        b_im = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for d in range(0, padded // 16):
            u, longest = gathered(
                words_ptr, shorts_ptr, octets_ptr, values_ptr, record, M1 * (padded // 16), d * M1 + k1, z_row, inputs,
                values, BLOCK_C, BLOCK_J,
            )  # fmt: skip
            if longest > 0:
                b_re, b_im = second_factor(u.to(f_ptr.dtype.element_ty), b_re, b_im, m_ptr, d, n2, padded)
        v = first_factor(b_re, b_im, v, f_ptr, t_ptr, inner_t_ptr, k1, n2, padded, M1, THREE, 1, BLOCK_C, BLOCK_N)
    n = tl.arange(0, M1)[:, None] * cut + n2[None, :]
    y_row = y_ptr + tl.load(rows_ptr + token) * y_stride + tl.load(columns_ptr + layer)
    inside = (n2 < cut)[None, :] & (n < size)
    y_at = y_row + source(n, size, DCT)
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (y + v).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def second_factor(u, b_re, b_im, m_ptr, d, n2, padded):
    """B += u M, of the 16 coefficients of the second factor from 16 d on."""
    m_at = m_ptr + (d * 16 + tl.arange(0, 16))[:, None] * padded + n2[None, :]
    b_re = tl.dot(u, tl.load(m_at), b_re, input_precision="ieee")
    b_im = tl.dot(u, tl.load(m_at + padded * padded), b_im, input_precision="ieee")
    return b_re, b_im


@triton.jit
def first_factor(
    b_re, b_im, v, f_ptr, t_ptr, inner_t_ptr, k1, n2, padded, M1: tl.constexpr, THREE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v + Re F^T Ar + Im F^T Ai. b: (BLOCK_C * BLOCK_T, BLOCK_N), rows (k1, t); v: (M1, BLOCK_T * BLOCK_N), columns (t,
    n2). Of three stages BLOCK_C is M1 and v is left out."""
    operand = f_ptr.dtype.element_ty
    b_re = tl.reshape(b_re, (BLOCK_C, BLOCK_T, BLOCK_N))
    b_im = tl.reshape(b_im, (BLOCK_C, BLOCK_T, BLOCK_N))
    t_at = t_ptr + k1[:, None, None] * padded + n2[None, None, :]
    t_re, t_im = tl.load(t_at), tl.load(t_at + M1 * padded)
    a_re = tl.reshape((t_re * b_re + t_im * b_im).to(operand), (BLOCK_C, BLOCK_T * BLOCK_N))
    a_im = tl.reshape((t_re * b_im - t_im * b_re).to(operand), (BLOCK_C, BLOCK_T * BLOCK_N))
    if THREE:
        v = inner_inverse(a_re, a_im, f_ptr, inner_t_ptr, BLOCK_T * BLOCK_N)
    else:
        f_at = f_ptr + tl.arange(0, M1)[:, None] * M1 + k1[None, :]
        v = tl.dot(tl.load(f_at), a_re, v, input_precision="ieee")
        v = tl.dot(tl.load(f_at + M1 * M1), a_im, v, input_precision="ieee")
    return v
