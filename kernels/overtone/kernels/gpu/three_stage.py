"""The two stages of `whole` = 16 x 16 in transforms of three (see `overtone.kernels.gpu.plans`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inner_forward(b_re, b_im, inner_f_ptr, inner_t_ptr, m_ptr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """sum_n2 M[k2, n2] b[k1, t, n2], real. b: (BLOCK_K, BLOCK_T * 256), of the operands' type; returns (16, BLOCK_K *
    BLOCK_T * 16), rows kc, columns (k1, t, kb), float32. All products are wide: warps share columns, none has them all."""
    others: tl.constexpr = BLOCK_K * BLOCK_T
    b_re = tl.reshape(tl.permute(tl.reshape(b_re, (others, 16, 16)), (1, 0, 2)), (16, others * 16))
    b_im = tl.reshape(tl.permute(tl.reshape(b_im, (others, 16, 16)), (1, 0, 2)), (16, others * 16))
    at = tl.arange(0, 16)
    square = at[:, None] * 16 + at[None, :]
    f_re, f_im = tl.load(inner_f_ptr + square), tl.load(inner_f_ptr + 256 + square)
    # (kb, (k1, t, nc))
    d_re = tl.dot(f_re, b_re, input_precision="ieee")
    d_re = tl.dot(tl.load(inner_f_ptr + 512 + square), b_im, d_re, input_precision="ieee")
    d_im = tl.dot(f_re, b_im, input_precision="ieee")
    d_im = tl.dot(f_im, b_re, d_im, input_precision="ieee")
    t_at = inner_t_ptr + at[:, None] * 16 + (tl.arange(0, others * 16) % 16)[None, :]
    t_re, t_im = tl.load(t_at), tl.load(t_at + 256)
    operand = b_re.dtype
    e_re = _last_first((t_re * d_re - t_im * d_im).to(operand), others)
    e_im = _last_first((t_re * d_im + t_im * d_re).to(operand), others)
    turned = at[None, :] * 16 + at[:, None]
    z = tl.dot(tl.load(m_ptr + turned), e_re, input_precision="ieee")
    return tl.dot(tl.load(m_ptr + 256 + turned), e_im, z, input_precision="ieee")


@triton.jit
def _last_first(d, OTHERS: tl.constexpr):
    """(kb, (others, nc)) as (nc, (others, kb))."""
    return tl.reshape(tl.permute(tl.reshape(d, (16, OTHERS, 16)), (2, 1, 0)), (16, OTHERS * 16))


@triton.jit
def inner_inverse(a_re, a_im, inner_f_ptr, inner_t_ptr, COLUMNS: tl.constexpr):
    """Re sum_k1 conj(F[k1, n1]) a[k1, c]. a: (256, COLUMNS), of the operands' type; returns (256, COLUMNS), rows n1,
    float32."""
    a_re, a_im = tl.reshape(a_re, (16, 16 * COLUMNS)), tl.reshape(a_im, (16, 16 * COLUMNS))
    at = tl.arange(0, 16)
    square = at[:, None] * 16 + at[None, :]
    f_re, f_im = tl.load(inner_f_ptr + square), tl.load(inner_f_ptr + 256 + square)
    # (nb, (ka, c)); F' is symmetric.
    e_re = tl.dot(f_re, a_re, input_precision="ieee")
    e_re = tl.dot(f_im, a_im, e_re, input_precision="ieee")
    e_im = tl.dot(f_re, a_im, input_precision="ieee")
    e_im = tl.dot(tl.load(inner_f_ptr + 512 + square), a_re, e_im, input_precision="ieee")
    t_at = inner_t_ptr + (tl.arange(0, 16 * COLUMNS) // COLUMNS * 16)[None, :] + at[:, None]
    t_re, t_im = tl.load(t_at), tl.load(t_at + 256)
    operand = a_re.dtype
    g_re = _ka_first((t_re * e_re + t_im * e_im).to(operand), COLUMNS)
    g_im = _ka_first((t_re * e_im - t_im * e_re).to(operand), COLUMNS)
    v = tl.dot(f_re, g_re, input_precision="ieee")
    v = tl.dot(f_im, g_im, v, input_precision="ieee")
    return tl.reshape(v, (256, COLUMNS))


@triton.jit
def _ka_first(g, COLUMNS: tl.constexpr):
    """(nb, (ka, c)) as (ka, (nb, c))."""
    return tl.reshape(tl.permute(tl.reshape(g, (16, 16, COLUMNS)), (1, 0, 2)), (16, 16 * COLUMNS))
