"""Attention over a paged KV cache, plugged in through transformers' public attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from overtone.errors import UnsupportedModel
from overtone.models.attend import Softmax, attend
from overtone.models.canonical import attend_canonical
from overtone.models.paged import Group, Paged, PagedBatch

ATTENTION_NAME = "overtone_paged"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: Paged | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(cap tanh(q K^T * scaling / cap)) V over what each token sees of its own sequence (see `Softmax`).

    query: (1, heads, T, D); key, value: (1, kv_heads, T, D); returns (1, T, heads, D). Writes key and value to the cache
    first.
    """
    assert paged is not None, "the model did not pass our keyword on to its attention"
    layer: Any = module.layer_idx
    new = torch.stack((key[0].transpose(0, 1), value[0].transpose(0, 1)), dim=1)
    paged.write(layer, new)
    out = attend_paged(paged, layer, query[0].transpose(0, 1), new, Softmax(scaling, softcap, s_aux))
    return out[None], None


def attend_paged(paged: Paged, layer: int, query: torch.Tensor, new: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """query: (T, heads, D); new: (T, 2, kv_heads, D), the step's own keys and values, which are in the cache already;
    returns (T, heads, D)."""
    if not isinstance(paged, PagedBatch):
        return paged.attend(layer, query, new, softmax)
    cache = paged.cache[layer]
    by_row = softmax.plain and paged.native is not None
    groups = paged.groups(layer, singles=not by_row)
    by_page = cache.view(-1, paged.page_tokens, *cache.shape[1:])
    if not by_row and len(groups) == 1 and groups[0].real is None and groups[0].rows.shape[1] == 1:
        return _attend_group(query, by_page, groups[0], softmax)[:, 0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if by_row and (rows := paged.single_rows(layer)) is not None:
        assert paged.native is not None
        paged.native.attend_rows(query, cache, rows, out, paged.page_tokens, softmax.scale(query.shape[-1]))
    for group in groups:
        found = _attend_group(query, by_page, group, softmax)
        if group.real is None:
            out[group.rows] = found
        else:
            out[group.rows[group.real]] = found[group.real]
    return out


def _attend_group(query: torch.Tensor, cache: torch.Tensor, group: Group, softmax: Softmax) -> torch.Tensor:
    """query: (T, heads, D); cache: (pages, page_tokens, 2, kv_heads, D); returns (B, n, heads, D)."""
    batch = len(group.pages)
    # Whole pages are copied: long runs of memory.
    seen = cache.index_select(0, group.pages.view(-1)).view(batch, -1, *cache.shape[2:])[:, : group.keys]
    keys, values = seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)
    mask = None if group.mask is None else group.mask[..., : group.keys]
    queries = query[group.rows].transpose(1, 2)
    if group.canonical and mask is not None:
        return attend_canonical(queries, keys, values, mask, softmax).transpose(1, 2)
    return attend(queries, keys, values, mask, softmax).transpose(1, 2)


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
