"""How attention's scores become weights, and where a token's keys lie: what the kernels of single tokens and of prompts
share.

A layer's cache is (pages, page_tokens, 2, kv_heads, D), keys then values; each page is a run of memory, pages are any
distance apart (other layers' parts may lie between); slot = page * page_tokens + position in the page. Scores are kept
times log2 e, so that weights are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """softmax(cap tanh(scale q K^T / cap)) over the keys that a token sees.

    cap: None for scores as they are (Gemma 2); sinks: (heads,), a score a head that joins the sum but has no value
    (gpt-oss); window: how many keys (its own included) a token sees, 0 or less: all.
    """

    scale: float
    cap: float | None = None
    sinks: torch.Tensor | None = None
    window: int = 0


def check_cache(query: torch.Tensor, cache: torch.Tensor) -> None:
    """query: (T, heads, D), tokens any distance apart; cache: (pages, page_tokens, 2, kv_heads, D)."""
    page_tokens, kv_heads, dim = cache.shape[1], *cache.shape[3:]
    assert query.shape[2] == dim
    assert query.shape[1] % kv_heads == 0
    assert query.stride()[1:] == (query.shape[2], 1)
    assert cache[0].is_contiguous()
    assert page_tokens >= 8
    assert page_tokens & (page_tokens - 1) == 0
    assert query.dtype is cache.dtype


@triton.jit
def scores_of(products, scale, cap, CAPPED: tl.constexpr):
    """products: q K^T; returns log2 e times the scores."""
    if CAPPED:
        # tanh by a power that cannot overflow.
        x = products * (scale / cap)
        fade = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        bent = (1.0 - fade) / (1.0 + fade)
        return tl.where(x < 0, -bent, bent) * (cap * LOG2E)
    return products * (scale * LOG2E)


@triton.jit
def places_of(table_ptr, keys, seen, PAGE_STRIDE: tl.constexpr, PAGE: tl.constexpr, TOKEN: tl.constexpr):
    """table_ptr: a sequence's pages; keys: positions in it; int64, where their keys lie, 0 where a key is not seen."""
    page = tl.load(table_ptr + keys // PAGE, mask=seen, other=0).to(tl.int64)
    return tl.where(seen, page * PAGE_STRIDE + keys % PAGE * TOKEN, 0)


@triton.jit
def divided(sums, largest, total, sinks_ptr, heads, real, SINKS: tl.constexpr):
    """The weighted means, from sums (H, D) of values times 2^(score - largest) and their total (H,), with each head's sink
    in the total."""
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=real, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(largest, sink)
        fade = tl.exp2(largest - top)
        total = total * fade + tl.exp2(sink - top)
        sums = sums * fade[:, None]
    return sums / total[:, None]
