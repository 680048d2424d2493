"""A step's plan as tensors: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.engine.logprobs import prompt_rows
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sequence import Sequence
from overtone.models.attention import DecodeGroup, PagedBatch, PromptChunk


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """All tokens of a step in one row: input_ids, position_ids (1, T) int64; logit_rows (S + P,) int64, the last token of
    each chunk that completes, in the plan's order, then the prompt tokens whose log-probabilities are asked for."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_rows: torch.Tensor


def pack_tokens(plan: StepPlan, device: torch.device) -> PackedTokens:
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    asked: list[int] = []
    for chunk in plan.chunks:
        start, stop = chunk.sequence.computed, chunk.sequence.computed + chunk.length
        asked += (len(ids) + row for row in prompt_rows(chunk))
        ids += chunk.sequence.token_slice(start, stop)
        positions += range(start, stop)
        if chunk.completes:
            rows.append(len(ids) - 1)
    return PackedTokens(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        logit_rows=torch.tensor(rows + asked, dtype=torch.int64, device=device),
    )


def place_tokens(plan: StepPlan, cache: torch.Tensor, page_tokens: int, windows: tuple[int | None, ...]) -> PagedBatch:
    """Where the step's tokens read and write the cache (layers, 2, slots, kv_heads, head_dim); windows: one a layer."""
    offsets = torch.arange(page_tokens, device=cache.device)
    decodes = [chunk.sequence for chunk in plan.decodes]
    writes = []
    if decodes:
        ends = [
            s.pages[(s.num_tokens - 1) // page_tokens] * page_tokens + (s.num_tokens - 1) % page_tokens for s in decodes
        ]
        writes.append(torch.tensor(ends, device=cache.device))
    chunks: list[PromptChunk] = []
    start = len(decodes)
    for chunk in plan.prefills:
        slots = _slots(chunk, offsets, page_tokens)
        chunks.append(PromptChunk(start, start + chunk.length, chunk.sequence.computed, slots))
        writes.append(slots[chunk.sequence.computed :])
        start += chunk.length
    return PagedBatch(cache, torch.cat(writes), _decode_groups(decodes, offsets, page_tokens), tuple(chunks), windows)


def _decode_groups(decodes: list[Sequence], offsets: torch.Tensor, page_tokens: int) -> tuple[DecodeGroup, ...]:
    """Decoding sequences by the power of two that their pages fit in: padding at most doubles what is read, so one long
    sequence does not make all others as dear as itself."""
    buckets: dict[int, list[int]] = {}
    for row, sequence in enumerate(decodes):
        buckets.setdefault((-(-sequence.num_tokens // page_tokens) - 1).bit_length(), []).append(row)
    groups = []
    for rows in buckets.values():
        lengths = [decodes[row].num_tokens for row in rows]
        longest = max(lengths)
        pages = -(-longest // page_tokens)
        # Page 0 pads: it is always zero.
        table = torch.tensor([(decodes[row].pages + [0] * pages)[:pages] for row in rows], device=offsets.device)
        slots = (table[:, :, None] * page_tokens + offsets).flatten(1)[:, :longest]
        mask = torch.arange(longest, device=offsets.device) < torch.tensor(lengths, device=offsets.device)[:, None]
        groups.append(DecodeGroup(torch.tensor(rows, device=offsets.device), slots, mask[:, None, None]))
    return tuple(groups)


def _slots(chunk: Chunk, offsets: torch.Tensor, page_tokens: int) -> torch.Tensor:
    pages = torch.tensor(chunk.sequence.pages, dtype=torch.int64, device=offsets.device)
    end = chunk.sequence.computed + chunk.length
    return (pages[:, None] * page_tokens + offsets).flatten()[:end]
