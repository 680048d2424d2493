"""Attention over a paged KV cache, plugged in through transformers' public attention interface.

All tokens of a step are packed into one sequence of T. Sequences that decode come first, one token each; then chunks of
prompts. A token's keys and values go to a slot of the cache: slot = page * page_tokens + position in the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from overtone.errors import UnsupportedModel
from overtone.models.attend import Softmax, attend

ATTENTION_NAME = "overtone_paged"


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Packed tokens [start, stop) are consecutive tokens of one prompt; `past` of its tokens are in the cache already.

    slots: (past + stop - start,) int64, the cache slots of the prompt up to and including this chunk; window: how many
    tokens, itself included, a token sees, None: all.
    """

    start: int
    stop: int
    past: int
    slots: torch.Tensor
    window: int | None = None

    def within(self, window: int) -> Self:
        """The chunk without the past that none of its tokens sees."""
        if len(self.slots) <= window:
            return self
        past = min(self.past, window - 1)
        return replace(self, past=past, slots=self.slots[self.past - past :], window=window)

    def mask(self) -> torch.Tensor | None:
        """(n, past + n) bool, which keys its tokens see; None if the chunk is causal and no more."""
        if not self.past and self.window is None:
            return None
        tokens = self.stop - self.start
        mask = torch.ones(tokens, self.past + tokens, dtype=torch.bool, device=self.slots.device).tril(self.past)
        return mask if self.window is None else mask.triu(self.past - self.window + 1)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of like length that decode one token each.

    rows: (B,) int64, their packed tokens; slots: (B, L) int64, the slots of their sequences, padded with slot 0 to the
    longest; mask: (B, 1, 1, L) bool, False on padding.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor

    def within(self, window: int) -> Self:
        """The group with the last `window` tokens of each sequence alone."""
        if self.slots.shape[1] <= window:
            return self
        lengths = self.mask[:, 0, 0].sum(1, keepdim=True)
        index = (lengths - window).clamp(min=0) + torch.arange(window, device=lengths.device)
        return replace(self, slots=self.slots.gather(1, index), mask=(index < lengths)[:, None, None])


Parts = tuple[tuple[DecodeGroup, ...], tuple[PromptChunk, ...]]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the step's tokens live in the cache.

    cache: (layers, 2, slots, kv_heads, head_dim), keys then values; write_slots: (T,) int64; windows: one a layer, how many
    tokens (itself included) a token sees there, None: all.

    The cache keeps all tokens of a sequence in every layer, also those outside a layer's window: pages hold all layers.
    """

    cache: torch.Tensor
    write_slots: torch.Tensor
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]
    windows: Sequence[int | None]
    _seen: dict[int | None, Parts] = field(default_factory=dict)

    def seen(self, layer: int) -> Parts:
        """The decodes and chunks with what `layer` sees of them; made once a step for layers of one window."""
        window = self.windows[layer]
        if window not in self._seen:
            decodes, chunks = self.decodes, self.chunks
            if window is not None:
                decodes = tuple(group.within(window) for group in decodes)
                chunks = tuple(chunk.within(window) for chunk in chunks)
            self._seen[window] = decodes, chunks
        return self._seen[window]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedBatch | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(cap tanh(q K^T * scaling / cap)) V over what each token sees of its own sequence (see `Softmax`).

    query: (1, heads, T, D); key, value: (1, kv_heads, T, D); returns (1, T, heads, D). Writes key and value to the cache
    first. Padding slots hold zeros (never stale values, which might be NaN), so that masked weights of 0 stay 0.
    """
    assert paged is not None, "the model did not pass our keyword on to its attention"
    softmax = Softmax(scaling, softcap, s_aux)
    layer_index: Any = module.layer_idx
    layer = paged.cache[layer_index]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, Hkv, D]
    layer[0].index_copy_(0, paged.write_slots, keys)
    layer[1].index_copy_(0, paged.write_slots, values)
    out = torch.empty(query.shape[2], query.shape[1], values.shape[-1], dtype=query.dtype, device=query.device)
    decodes, chunks = paged.seen(layer_index)
    for group in decodes:
        out[group.rows] = _decode(query[0].index_select(1, group.rows).transpose(0, 1), layer, group, softmax)
    for chunk in chunks:
        out[chunk.start : chunk.stop] = _prefill(query[:, :, chunk.start : chunk.stop], layer, chunk, softmax)
    return out[None], None


def _decode(query: torch.Tensor, layer: torch.Tensor, group: DecodeGroup, softmax: Softmax) -> torch.Tensor:
    """One query token per sequence. query: (B, heads, D); returns (B, heads, D)."""
    batch, length = group.slots.shape
    kv_heads = layer.shape[2]
    index = group.slots.reshape(-1)
    keys = layer[0].index_select(0, index).view(batch, length, kv_heads, -1).transpose(1, 2)
    values = layer[1].index_select(0, index).view(batch, length, kv_heads, -1).transpose(1, 2)
    return attend(query[:, :, None], keys, values, group.mask, softmax)[:, :, 0]


def _prefill(query: torch.Tensor, layer: torch.Tensor, chunk: PromptChunk, softmax: Softmax) -> torch.Tensor:
    """A chunk of one prompt against its past and itself. query: (1, heads, n, D); returns (n, heads, D)."""
    keys = layer[0].index_select(0, chunk.slots).transpose(0, 1)[None]
    values = layer[1].index_select(0, chunk.slots).transpose(0, 1)[None]
    return attend(query, keys, values, chunk.mask(), softmax)[0].transpose(0, 1)


def install(model: nn.Module) -> None:
    """Makes `model`, a transformers model, compute attention by `paged_attention`."""
    use(model, ATTENTION_NAME, paged_attention)


def use(model: nn.Module, name: str, function: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """Makes `model` compute attention by `function`. Raises `UnsupportedModel` if it does not follow the interface."""
    AttentionInterface.register(name, function)
    model.set_attn_implementation(name)  # type: ignore[operator]
    # transformers only logs a warning if the model's attention is its own, and each request would see its neighbours.
    if any(m.config._attn_implementation != name for m in model.modules() if isinstance(m, PreTrainedModel)):
        raise UnsupportedModel(
            f"{type(model).__name__} does not follow transformers' attention interface", field="architectures"
        )
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise UnsupportedModel(f"{type(model).__name__} has attention that looks ahead", field="is_causal")
