"""Attention of some queries over some keys: torch's fused form where it can, the plain product where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_HEAD_BY_HEAD_FROM = 16
"""Sequences from which plain products are faster than torch's fused attention, which sees one query a head here (half the
time at 64 sequences on 2 CPU cores, as long at 16, four times as long at one)."""


@dataclass(frozen=True, slots=True)
class Softmax:
    """How scores become weights: softmax(cap tanh(q K^T scaling / cap)).

    scaling: None for 1 / sqrt(D); cap: None for scores as they are (Gemma 2); sinks: (heads,), a score a head that joins the
    sum but has no value (gpt-oss).
    """

    scaling: float | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.cap is None and self.sinks is None

    def scale(self, dim: int) -> float:
        """What scores are multiplied by, of heads of `dim`."""
        return dim**-0.5 if self.scaling is None else self.scaling


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, softmax: Softmax
) -> torch.Tensor:
    """softmax(q K^T) V. query: (B, heads, n, D); keys, values: (B, kv_heads, L, D); returns (B, heads, n, D).

    mask: in the query's dtype, 0 where a key is seen and -inf where not, broadcast to (B, 1, n, L); None: n == L and each
    token sees those before it. A query sees one key at least.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    if softmax.plain and tokens > 1:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=softmax.scaling, enable_gqa=True
        )
    # The query heads that share a key head become rows of one product: keys are never repeated.
    grouped = query.reshape(batch, kv_heads, -1, dim)
    if softmax.plain and mask is not None and batch >= _HEAD_BY_HEAD_FROM and query.dtype is torch.float32:
        return _head_by_head(grouped, keys, values, mask, softmax.scale(dim)).reshape(batch, heads, tokens, -1)
    if softmax.plain:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=softmax.scaling)
        return out.reshape(batch, heads, tokens, -1)
    scores = grouped @ keys.transpose(-2, -1) * softmax.scale(dim)
    if softmax.cap is not None:
        scores = (scores / softmax.cap).tanh() * softmax.cap
    if mask is None:
        mask = torch.full((tokens, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    scores = scores.view(batch, heads, tokens, length) + mask
    weights = _weights(scores.float(), softmax.sinks).to(query.dtype)
    return (weights.view(batch, kv_heads, -1, length) @ values).view(batch, heads, tokens, -1)


def _head_by_head(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same for one token a sequence, as two batched products a key head. query: (B, kv_heads, G, D)."""
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = torch.baddbmm(mask[:, 0], query[:, head], keys[:, head].transpose(1, 2), alpha=scale)
        out[:, head] = torch.bmm(scores.softmax(-1), values[:, head])
    return out


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last of (B, heads, n, L), with each head's sink in the sum."""
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
