"""Attention over a paged KV cache, plugged in through transformers' public attention interface.

All tokens of a step are packed into one sequence of T. Sequences that decode come first, one token each; then chunks of
prompts. A token's keys and values go to a slot of the cache: slot = page * page_tokens + position in the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from overtone.errors import UnsupportedModel

ATTENTION_NAME = "overtone_paged"

_UNSUPPORTED_ARGUMENTS = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
}


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Packed tokens [start, stop) are consecutive tokens of one prompt; `past` of its tokens are in the cache already.

    slots: (past + stop - start,) int64, the cache slots of the prompt up to and including this chunk.
    """

    start: int
    stop: int
    past: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of like length that decode one token each.

    rows: (B,) int64, their packed tokens; slots: (B, L) int64, the slots of their sequences, padded with slot 0 to the
    longest; mask: (B, 1, 1, L) bool, False on padding.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the step's tokens live in the cache.

    cache: (layers, 2, slots, kv_heads, head_dim), keys then values; write_slots: (T,) int64.
    """

    cache: torch.Tensor
    write_slots: torch.Tensor
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedBatch | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q K^T * scaling) V over each token's own sequence.

    query: (1, heads, T, D); key, value: (1, kv_heads, T, D); returns (1, T, heads, D). Writes key and value to the cache
    first. Padding slots hold zeros (never stale values, which might be NaN), so that masked weights of 0 stay 0.
    """
    assert paged is not None, "the model did not pass our keyword on to its attention"
    for name, what in _UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"the model uses {what} ({name}={kwargs[name]}), which is not supported", field=name)
    layer_index: Any = module.layer_idx
    layer = paged.cache[layer_index]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, Hkv, D]
    layer[0].index_copy_(0, paged.write_slots, keys)
    layer[1].index_copy_(0, paged.write_slots, values)
    out = torch.empty(query.shape[2], query.shape[1], values.shape[-1], dtype=query.dtype, device=query.device)
    for group in paged.decodes:
        out[group.rows] = _decode(query[0].index_select(1, group.rows).transpose(0, 1), layer, group, scaling)
    for chunk in paged.chunks:
        out[chunk.start : chunk.stop] = _prefill(query[:, :, chunk.start : chunk.stop], layer, chunk, scaling)
    return out[None], None


def _decode(query: torch.Tensor, layer: torch.Tensor, group: DecodeGroup, scaling: float | None) -> torch.Tensor:
    """One query token per sequence. query: (B, heads, D); returns (B, heads, D)."""
    batch, length = group.slots.shape
    kv_heads = layer.shape[2]
    index = group.slots.reshape(-1)
    keys = layer[0].index_select(0, index).view(batch, length, kv_heads, -1).transpose(1, 2)
    values = layer[1].index_select(0, index).view(batch, length, kv_heads, -1).transpose(1, 2)
    # The query heads that share a key head become rows of one product: keys are never repeated.
    grouped = query.reshape(batch, kv_heads, query.shape[1] // kv_heads, -1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scaling)
    return out.reshape(batch, query.shape[1], -1)


def _prefill(query: torch.Tensor, layer: torch.Tensor, chunk: PromptChunk, scaling: float | None) -> torch.Tensor:
    """A chunk of one prompt against its past and itself. query: (1, heads, n, D); returns (n, heads, D)."""
    keys = layer[0].index_select(0, chunk.slots).transpose(0, 1)[None]
    values = layer[1].index_select(0, chunk.slots).transpose(0, 1)[None]
    tokens = chunk.stop - chunk.start
    mask = None
    if chunk.past:
        mask = torch.ones(tokens, chunk.past + tokens, dtype=torch.bool, device=query.device).tril(chunk.past)
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def install(model: nn.Module) -> None:
    """Makes `model`, a transformers model, compute attention by `paged_attention`."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    # transformers only logs a warning if the model's attention is its own, and each request would see its neighbours.
    if any(m.config._attn_implementation != ATTENTION_NAME for m in model.modules() if isinstance(m, PreTrainedModel)):
        raise UnsupportedModel(
            f"{type(model).__name__} does not follow transformers' attention interface", field="architectures"
        )
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise UnsupportedModel(f"{type(model).__name__} has attention that looks ahead", field="is_causal")
