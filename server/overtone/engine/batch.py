"""A step's plan as tensors: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.engine.logprobs import prompt_rows
from overtone.engine.scheduler import StepPlan
from overtone.kernels.native import NativeKernels
from overtone.models.canonical import CanonicalBatch
from overtone.models.paged import PagedBatch, Span


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


def place_tokens(
    plan: StepPlan,
    cache: torch.Tensor,
    page_tokens: int,
    windows: tuple[int | None, ...],
    *,
    canonical: bool = False,
    native: NativeKernels | None = None,
) -> PagedBatch:
    """Where the step's tokens read and write the cache (layers, slots, 2, kv_heads, head_dim); windows: one a layer;
    canonical: in groups whose shapes do not depend on the batch; native: see `PagedBatch`."""
    spans = spans_of(plan)
    if canonical:
        prompts = [len(chunk.sequence.request.prompt_ids) for chunk in plan.chunks]
        return CanonicalBatch(cache, page_tokens, spans, windows, prompts, native)
    return PagedBatch(cache, page_tokens, spans, windows, native)


def spans_of(plan: StepPlan) -> list[Span]:
    """Of all chunks, in the plan's order."""
    spans, start = [], 0
    for chunk in plan.chunks:
        spans.append(Span(start, chunk.length, chunk.sequence.computed, chunk.sequence.pages))
        start += chunk.length
    return spans
