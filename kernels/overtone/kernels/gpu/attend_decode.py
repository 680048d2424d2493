"""out[t] = softmax(scale q[t] K^T) V for single tokens over a paged cache, the keys of a token split among programs.

    part s of a token: its keys [s SPLIT, (s + 1) SPLIT)       w = exp(score - m_s)
    m_s = max score        l_s = sum w        o_s = sum w v
    m = max m_s        out = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s

Nothing is gathered or padded: a program reads its keys where they lie, once for all query heads that share a key head (a
tile of the product: groups are filled up to 16 rows of zeros). SPLIT comes from a table of chips, and a token's parts begin
at multiples of it in its own sequence, so its result depends neither on the batch nor on how many programs there are. Keys
outside of what a token sees are not read: what stale pages hold (NaN, say) cannot matter.
Source: flash decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.scoring import Scoring, check_cache, divided, places_of, scores_of

PARTS = 16
"""That a program of the second kernel adds at once."""
_TALL = 32
"""Rows above which a program has twice as many warps."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """split: keys of a part; block_n: of them at once; programs: that one launch has at most, about, where there are more
    parts, each program takes several."""

    split: int = 256
    block_n: int = 64
    programs: int = 16384
    warps: int = 4

    def rows(self, group: int) -> int:
        """Of a tile, `group` query heads sharing a key head."""
        return int(max(16, triton.next_power_of_2(group)))

    def warps_of(self, group: int) -> int:
        """Of a program."""
        return self.warps * (2 if self.rows(group) > _TALL else 1)


@dataclass(frozen=True, slots=True, eq=False)
class SeenKeys:
    """B tokens that attend one by one.

    tokens: (B,) int64, which of the packed tokens each is, -1: none, nothing is written; lengths: (B,) int32, how many keys
    its sequence has up to it, 0: a row that only fills the batch, zeros are written; table: (B, P) int64 or int32, its
    sequence's pages.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor


def splits_of(keys: int, window: int, config: DecodeConfig) -> int:
    """The most parts that a token of at most `keys` keys has."""
    every = -(-keys // config.split)
    return max(1, every if window <= 0 else min(every, (window + config.split - 2) // config.split + 1))


def decode_workspace(batch: int, heads: int, dim: int, splits: int) -> int:
    """How many float32 numbers `attend_decode` works in."""
    return batch * heads * splits * (dim + 2) if splits > 1 else 0


def attend_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    seen: SeenKeys,
    out: torch.Tensor,
    workspace: torch.Tensor,
    splits: int,
    scoring: Scoring,
    config: DecodeConfig,
) -> None:
    """query, out: (T, heads, D), float32, float16 or bfloat16, tokens any distance apart; cache: (pages, page_tokens, 2,
    kv_heads, D) of that dtype; workspace: `decode_workspace` float32 numbers; splits: at least `splits_of` the longest row
    of the batch.

    The launches depend on shapes and on `splits` alone.
    """
    check_cache(query, cache)
    check_cache(out, cache)
    heads, dim = query.shape[1:]
    batch, kv_heads = len(seen.tokens), cache.shape[3]
    assert config.split % config.block_n == 0
    assert len(seen.lengths) == len(seen.table) == batch
    assert seen.table.stride(1) == 1
    assert workspace.dtype is torch.float32
    assert workspace.numel() >= decode_workspace(batch, heads, dim, splits)
    if not batch:
        return
    group, width = heads // kv_heads, triton.next_power_of_2(dim)
    sums, states = workspace, workspace[batch * heads * splits * dim :]
    sinks = query if scoring.sinks is None else scoring.sinks
    programs = min(splits, triton.cdiv(config.programs, batch * kv_heads))
    _attend_parts[batch, kv_heads, programs](
        query, cache, seen.tokens, seen.lengths, seen.table, sinks, sums, states, out,
        seen.table.stride(0), splits, scoring.scale, scoring.cap or 0.0, scoring.window,
        QUERY_STRIDE=query.stride(0), OUT_STRIDE=out.stride(0), KV_HEADS=kv_heads, GROUP=group, DIM=dim,
        ROWS=config.rows(group), WIDTH=max(16, width),
        PAGE=cache.shape[1], PAGE_STRIDE=cache.stride(0),
        SPLIT=config.split, BLOCK_N=config.block_n, CAPPED=scoring.cap is not None,
        SINKS=scoring.sinks is not None, num_warps=config.warps_of(group), enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _add_parts[batch, heads](
            seen.tokens, seen.lengths, sinks, sums, states, out, splits, scoring.window,
            OUT_STRIDE=out.stride(0), HEADS=heads, DIM=dim, WIDTH=width, SPLIT=config.split, PARTS=PARTS,
            SINKS=scoring.sinks is not None,
            num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _seen(length, window, splits, SPLIT: tl.constexpr):
    """The first key that is seen, the part that it is in, and how many parts there are (more than `splits` have no room)."""
    first = length - length
    if window > 0:
        first = tl.maximum(length - window, 0)
    begin = first // SPLIT
    return first, begin, tl.minimum((length + SPLIT - 1) // SPLIT - begin, splits)


@triton.jit(do_not_specialize=["table_stride", "splits"], do_not_specialize_on_alignment=["lengths_ptr"])
def _attend_parts(
    query_ptr,
    cache_ptr,
    tokens_ptr,
    lengths_ptr,
    table_ptr,
    sinks_ptr,
    sums_ptr,
    states_ptr,
    out_ptr,
    table_stride,
    splits,
    scale,
    cap,
    window,
    QUERY_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    if token < 0:
        return
    length = tl.load(lengths_ptr + row).to(tl.int32)
    first, begin, parts = _seen(length, window, splits, SPLIT)
    if tl.program_id(2) >= tl.maximum(parts, 1):
        return
    g, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = kv * GROUP + g
    real = (g < GROUP)[:, None] & (d < DIM)[None, :]
    place = head[:, None] * DIM + d[None, :]
    if length <= 0:
        tl.store(out_ptr + token * OUT_STRIDE + place, tl.zeros((ROWS, WIDTH), out_ptr.dtype.element_ty), mask=real)
        return
    query = tl.load(query_ptr + token * QUERY_STRIDE + place, mask=real, other=0.0)
    pages = table_ptr + row * table_stride
    for part in range(tl.program_id(2), parts, tl.num_programs(2)):
        low = tl.maximum((begin + part) * SPLIT, first)
        high = tl.minimum((begin + part + 1) * SPLIT, length)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        for at in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            seen = (n >= low) & (n < high)
            here = cache_ptr + places_of(pages, n, seen, PAGE_STRIDE, PAGE, 2 * KV_HEADS * DIM) + kv * DIM
            inside = seen[:, None] & (d < DIM)[None, :]
            keys = tl.load(here[:, None] + d[None, :], mask=inside, other=0.0)
            values = tl.load(here[:, None] + (KV_HEADS * DIM + d)[None, :], mask=inside, other=0.0)
            scores = scores_of(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, cap, CAPPED)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            most = tl.maximum(largest, tl.max(scores, 1))
            fade = tl.exp2(largest - most)
            weights = tl.exp2(scores - most[:, None])
            total = total * fade + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
            largest = most
        # Read again, always 0: so the addresses are made anew and take no registers all through the loop.
        g = tl.arange(0, ROWS) + (tl.load(lengths_ptr + row, volatile=True).to(tl.int32) - length)
        head = kv * GROUP + g
        real = (g < GROUP)[:, None] & (d < DIM)[None, :]
        if parts == 1:
            found = divided(sums, largest, total, sinks_ptr, head, g < GROUP, SINKS)
            to = out_ptr + (token * OUT_STRIDE + head * DIM)[:, None] + d[None, :]
            tl.store(to, found.to(out_ptr.dtype.element_ty), mask=real)
        else:
            unit = (row * (KV_HEADS * GROUP) + head) * splits + part
            tl.store(sums_ptr + (unit * DIM)[:, None] + d[None, :], sums, mask=real)
            tl.store(states_ptr + unit * 2, largest, mask=g < GROUP)
            tl.store(states_ptr + unit * 2 + 1, total, mask=g < GROUP)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["lengths_ptr"])
def _add_parts(
    tokens_ptr,
    lengths_ptr,
    sinks_ptr,
    sums_ptr,
    states_ptr,
    out_ptr,
    splits,
    window,
    OUT_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    _, _, parts = _seen(length, window, splits, SPLIT)
    if (token < 0) | (parts <= 1):
        return
    d = tl.arange(0, WIDTH)
    first = (row * HEADS + head) * splits
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, WIDTH), tl.float32)
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        there = part < parts
        unit = first + part
        tops = tl.load(states_ptr + unit * 2, mask=there, other=float("-inf"))
        totals = tl.load(states_ptr + unit * 2 + 1, mask=there, other=0.0)
        inside = there[:, None] & (d < DIM)[None, :]
        found = tl.load(sums_ptr + unit[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        most = tl.maximum(largest, tl.max(tops, 0))
        fade, fades = tl.exp2(largest - most), tl.exp2(tops - most)
        total = total * fade + tl.sum(totals * fades, 0)
        sums = sums * fade[:, None] + tl.sum(found * fades[:, None], 0)[None, :]
        largest = most
    heads = head + tl.arange(0, 1)
    result = divided(sums, largest, total, sinks_ptr, heads, heads < HEADS, SINKS)
    to = out_ptr + token * OUT_STRIDE + (head * DIM + d)[None, :]
    tl.store(to, result.to(out_ptr.dtype.element_ty), mask=(d < DIM)[None, :])
