"""Queries and keys rotated in place, each head first normed where the model does so; keys and values into the cache.

    x = weight * (x / sqrt(mean(x^2) + epsilon))  (Qwen3)        rope(x) = x cos + swap(x) sin'

swap: the halves of a head exchanged; sin' = (-sin, sin). float32 inside; norms round as `overtone.kernels.gpu.rms_norm`. A
program has BLOCK_H heads of one token, both halves of each: nothing is read that another one writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.layers import HeadNorms


@dataclass(frozen=True, slots=True)
class RotateConfig:
    """block_h: heads of a program; a tile of them has at least a number for each thread."""

    block_h: int = 16
    warps: int = 4


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    norms: HeadNorms | None,
    config: RotateConfig,
) -> None:
    """qkv: (m, (heads + 2 kv_heads) D), its last dimension contiguous; cos, signed_sin: (m, D), contiguous, of any floating
    dtype; slots: (m,) int64, -1: this token is not written to the cache; cache: (pages,
    page_tokens, 2, kv_heads, D), each page a run of memory."""
    m, width = qkv.shape
    kv_heads, dim = cache.shape[3:]
    heads = width // dim
    assert dim % 2 == width % dim == 0
    assert cos.shape == signed_sin.shape == (m, dim)
    assert cos.is_contiguous()
    assert signed_sin.is_contiguous()
    assert cache[0].is_contiguous()
    assert qkv.stride(1) == 1
    assert len(slots) == m
    if not m:
        return
    half = max(16, triton.next_power_of_2(dim // 2))
    query, key = (cos, cos) if norms is None else (norms.query, norms.key)
    _rotate_and_write[m, triton.cdiv(heads, config.block_h)](
        qkv, cos, signed_sin, slots, cache, query, key, qkv.stride(0),
        0.0 if norms is None else norms.epsilon,
        HEADS=heads - 2 * kv_heads, KV_HEADS=kv_heads, DIM=dim, HALF=half, PAGE=cache.shape[1], PAGE_STRIDE=cache.stride(0),
        BLOCK_H=config.block_h,
        NORMED=norms is not None, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _rotate_and_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    cache_ptr,
    query_norm_ptr,
    key_norm_ptr,
    stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORMED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    j = tl.arange(0, HALF)
    whole = j < DIM // 2
    there = (head < HEADS + 2 * KV_HEADS)[:, None] & whole[None, :]
    turns = (head < HEADS + KV_HEADS)[:, None]
    dtype = qkv_ptr.dtype.element_ty
    at = qkv_ptr + row * stride + head[:, None] * DIM + j[None, :]
    a = tl.load(at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(at + DIM // 2, mask=there, other=0.0).to(tl.float32)
    x, y = a, b
    if NORMED:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + epsilon)[:, None]
        of_query = (head < HEADS)[:, None]
        x = (a * scale).to(dtype).to(tl.float32) * _weights(query_norm_ptr, key_norm_ptr, j, whole, of_query)
        y = (b * scale).to(dtype).to(tl.float32) * _weights(
            query_norm_ptr + DIM // 2, key_norm_ptr + DIM // 2, j, whole, of_query
        )
        x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
    of_row = row * DIM + j
    cos_a = tl.load(cos_ptr + of_row, mask=whole, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + of_row + DIM // 2, mask=whole, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + of_row, mask=whole, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + of_row + DIM // 2, mask=whole, other=0.0).to(tl.float32)[None, :]
    new_a = tl.where(turns, x * cos_a + y * sin_a, a).to(dtype)
    new_b = tl.where(turns, y * cos_b + x * sin_b, b).to(dtype)
    tl.store(at, new_a, mask=there & turns)
    tl.store(at + DIM // 2, new_b, mask=there & turns)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    # The keys and the values of a slot are 2 KV_HEADS heads in a row, as they are here.
    here = cache_ptr + slot // PAGE * PAGE_STRIDE + slot % PAGE * (2 * KV_HEADS * DIM)
    to = here + (head - HEADS)[:, None] * DIM + j[None, :]
    written = there & (head >= HEADS)[:, None] & (slot >= 0)
    cached = cache_ptr.dtype.element_ty
    tl.store(to, new_a.to(cached), mask=written)
    tl.store(to + DIM // 2, new_b.to(cached), mask=written)


@triton.jit
def _weights(query_ptr, key_ptr, j, whole, of_query):
    """(heads, half of a head): the query's norm or the key's."""
    query = tl.load(query_ptr + j, mask=whole, other=0.0).to(tl.float32)[None, :]
    key = tl.load(key_ptr + j, mask=whole, other=0.0).to(tl.float32)[None, :]
    return tl.where(of_query, query, key)
