"""Attention of some queries over some keys: torch's fused form where it can, the plain product where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


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


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, softmax: Softmax
) -> torch.Tensor:
    """softmax(q K^T) V. query: (B, heads, n, D); keys, values: (B, kv_heads, L, D); returns (B, heads, n, D).

    mask: bool, True where a key is seen, broadcast to (B, 1, n, L); None: n == L and each token sees those before it. A
    query sees one key at least.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    if softmax.plain and tokens > 1:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=softmax.scaling, enable_gqa=True
        )
    # The query heads that share a key head become rows of one product: keys are never repeated.
    grouped = query.reshape(batch, kv_heads, -1, dim)
    if softmax.plain:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=softmax.scaling)
        return out.reshape(batch, heads, tokens, -1)
    scores = grouped @ keys.transpose(-2, -1) * (dim**-0.5 if softmax.scaling is None else softmax.scaling)
    if softmax.cap is not None:
        scores = (scores / softmax.cap).tanh() * softmax.cap
    if mask is None:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.view(batch, heads, tokens, length).masked_fill(~mask, -torch.inf)
    weights = _weights(scores.float(), softmax.sinks).to(query.dtype)
    return (weights.view(batch, kv_heads, -1, length) @ values).view(batch, heads, tokens, -1)


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last of (B, heads, n, L), with each head's sink in the sum."""
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
