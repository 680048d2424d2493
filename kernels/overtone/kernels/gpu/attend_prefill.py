"""out[t] = softmax(scale q[t] K^T) V for runs of consecutive tokens over a paged cache that already has their own keys.

A program takes a tile of a span's tokens for all query heads that share a key head, as BLOCK_M rows of one product, and goes
through the keys that they see, BLOCK_N at a time from a multiple of BLOCK_N on, with a running softmax; each token sees its
sequence up to itself. So a token's result depends neither on the other spans nor on where its span or its tile begins: keys
that it does not see add exact zeros. Keys that no token of the tile sees are not read.
Source: FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.scoring import Scoring, check_cache, divided, places_of, scores_of


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """block_m: rows, query heads times tokens, of a program; block_n: keys at once."""

    block_m: int = 128
    block_n: int = 64
    warps: int = 8

    def rows(self, group: int) -> int:
        """Of a program, `group` query heads sharing a key head."""
        return int(max(self.block_m, triton.next_power_of_2(group)))

    def tokens(self, group: int) -> int:
        """Of a program."""
        return self.rows(group) // group


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """S runs of packed tokens. starts: (S,) int32, the first packed token; tokens: (S,) int32, how many; past: (S,) int32,
    how many of the sequence come before; table: (S, P) int64 or int32, its pages."""

    starts: torch.Tensor
    tokens: torch.Tensor
    past: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SpanTiles:
    """What each program takes. spans: (W,) int32, -1: nothing; firsts: (W,) int32, from which token of the span on."""

    spans: torch.Tensor
    firsts: torch.Tensor


def prefill_tiles(
    shapes: Sequence[tuple[int, int]], group: int, config: PrefillConfig, device: torch.device, tiles: int = 0
) -> SpanTiles:
    """shapes: (tokens, past) of each span; those with most keys first, so that none of them runs when all others have ended.
    tiles: how many there are at least, the rest do nothing."""
    step = config.tokens(group)
    found = [(past + first, span, first) for span, (n, past) in enumerate(shapes) for first in range(0, n, step)]
    found.sort(key=lambda one: -one[0])
    rest = [-1] * max(0, tiles - len(found))
    spans = torch.tensor([span for _, span, _ in found] + rest, dtype=torch.int32)
    firsts = torch.tensor([first for _, _, first in found] + rest, dtype=torch.int32)
    return SpanTiles(spans.to(device, non_blocking=True), firsts.to(device, non_blocking=True))


def attend_prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    spans: Spans,
    tiles: SpanTiles,
    out: torch.Tensor,
    scoring: Scoring,
    config: PrefillConfig,
) -> None:
    """query, out: (T, heads, D), float32, float16 or bfloat16, tokens any distance apart, those of no span are left alone;
    cache: (pages, page_tokens, 2, kv_heads, D) of that dtype; tiles: as `prefill_tiles` makes them, for this config."""
    check_cache(query, cache)
    check_cache(out, cache)
    assert spans.table.stride(1) == 1
    assert len(tiles.spans) == len(tiles.firsts)
    kv_heads, dim = cache.shape[3:]
    group = query.shape[1] // kv_heads
    if not len(tiles.spans):
        return
    _attend_spans[len(tiles.spans), kv_heads](
        query, cache, tiles.spans, tiles.firsts, spans.starts, spans.tokens, spans.past, spans.table,
        query if scoring.sinks is None else scoring.sinks, out, spans.table.stride(0),
        scoring.scale, scoring.cap or 0.0, scoring.window, QUERY_STRIDE=query.stride(0), OUT_STRIDE=out.stride(0),
        KV_HEADS=kv_heads, GROUP=group, DIM=dim,
        WIDTH=max(16, triton.next_power_of_2(dim)), PAGE=cache.shape[1], PAGE_STRIDE=cache.stride(0),
        BLOCK_M=config.rows(group), BLOCK_N=config.block_n,
        CAPPED=scoring.cap is not None, SINKS=scoring.sinks is not None, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def _attend_spans(
    query_ptr,
    cache_ptr,
    tile_spans_ptr,
    tile_firsts_ptr,
    starts_ptr,
    tokens_ptr,
    past_ptr,
    table_ptr,
    sinks_ptr,
    out_ptr,
    table_stride,
    scale,
    cap,
    window,
    QUERY_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    span, kv = tl.load(tile_spans_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    if span < 0:
        return
    begin = tl.load(tile_firsts_ptr + tl.program_id(0))
    count, past = tl.load(tokens_ptr + span), tl.load(past_ptr + span)
    end = tl.minimum(begin + TOKENS, count)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    order, head = begin + m // GROUP, kv * GROUP + m % GROUP
    position = past + order
    real = (order < end)[:, None] & (d < DIM)[None, :]
    packed = (tl.load(starts_ptr + span) + order).to(tl.int64)
    query_at = query_ptr + (packed * QUERY_STRIDE + head * DIM)[:, None] + d[None, :]
    query = tl.load(query_at, mask=real, other=0.0)
    low, high = past - past, past + end
    if window > 0:
        low = tl.maximum(past + begin - window + 1, 0)
    pages = table_ptr + span * table_stride
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for at in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        there = (n >= low) & (n < high)
        here = cache_ptr + places_of(pages, n, there, PAGE_STRIDE, PAGE, 2 * KV_HEADS * DIM) + kv * DIM
        inside = there[:, None] & (d < DIM)[None, :]
        keys = tl.load(here[:, None] + d[None, :], mask=inside, other=0.0)
        values = tl.load(here[:, None] + (KV_HEADS * DIM + d)[None, :], mask=inside, other=0.0)
        scores = scores_of(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, cap, CAPPED)
        seen = there[None, :] & (n[None, :] <= position[:, None])
        if window > 0:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        # A token may see none of the keys so far.
        under = tl.where(most == float("-inf"), 0.0, most)
        fade = tl.exp2(largest - under)
        weights = tl.exp2(scores - under[:, None])
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
        largest = most
    # Read again, so that the addresses are made anew and take no registers all through the loop.
    begin = tl.load(tile_firsts_ptr + tl.program_id(0), volatile=True)
    order = begin + m // GROUP
    packed = (tl.load(starts_ptr + span) + order).to(tl.int64)
    to = out_ptr + (packed * OUT_STRIDE + head * DIM)[:, None] + d[None, :]
    real = (order < end)[:, None] & (d < DIM)[None, :]
    # Rows that belong to no token have seen nothing where the window is short.
    total = tl.where(total > 0.0, total, 1.0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    found = divided(sums, largest, total, sinks_ptr, head, order < end, SINKS)
    tl.store(to, found.to(out_ptr.dtype.element_ty), mask=real)
