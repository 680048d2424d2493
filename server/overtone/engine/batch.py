"""A step's plan as tensors: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.engine.scheduler import Chunk, StepPlan
from overtone.models.attention import PagedBatch, PromptChunk


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """All tokens of a step in one row: input_ids, position_ids (1, T) int64; logit_rows (S,) int64, the last token of each
    chunk that completes, in the plan's order."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_rows: torch.Tensor


def pack_tokens(plan: StepPlan, device: torch.device) -> PackedTokens:
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for chunk in plan.chunks:
        start, stop = chunk.sequence.computed, chunk.sequence.computed + chunk.length
        ids += chunk.sequence.token_slice(start, stop)
        positions += range(start, stop)
        if chunk.completes:
            rows.append(len(ids) - 1)
    return PackedTokens(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        logit_rows=torch.tensor(rows, dtype=torch.int64, device=device),
    )


def place_tokens(plan: StepPlan, cache: torch.Tensor, page_tokens: int) -> PagedBatch:
    """Where the step's tokens read and write the cache (layers, 2, slots, kv_heads, head_dim)."""
    device = cache.device
    decodes = [chunk.sequence for chunk in plan.decodes]
    lengths = torch.tensor([s.num_tokens for s in decodes], dtype=torch.int64, device=device)
    longest = max((s.num_tokens for s in decodes), default=0)
    pages = -(-longest // page_tokens)
    # Page 0 pads: it is always zero.
    table = torch.tensor([(s.pages + [0] * pages)[:pages] for s in decodes], dtype=torch.int64, device=device).view(
        len(decodes), pages
    )
    offsets = torch.arange(page_tokens, device=device)
    decode_slots = (table[:, :, None] * page_tokens + offsets).flatten(1)[:, :longest]
    decode_mask = (torch.arange(longest, device=device) < lengths[:, None])[:, None, None]
    writes = [decode_slots.gather(1, lengths[:, None] - 1).flatten()] if decodes else []
    chunks: list[PromptChunk] = []
    start = len(decodes)
    for chunk in plan.prefills:
        slots = _slots(chunk, offsets, page_tokens)
        chunks.append(PromptChunk(start, start + chunk.length, chunk.sequence.computed, slots))
        writes.append(slots[chunk.sequence.computed :])
        start += chunk.length
    return PagedBatch(cache, torch.cat(writes), decode_slots, decode_mask, tuple(chunks))


def _slots(chunk: Chunk, offsets: torch.Tensor, page_tokens: int) -> torch.Tensor:
    pages = torch.tensor(chunk.sequence.pages, dtype=torch.int64, device=offsets.device)
    end = chunk.sequence.computed + chunk.length
    return (pages[:, None] * page_tokens + offsets).flatten()[:end]
