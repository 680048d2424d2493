"""Logits of requests in one step of our own model: packed tokens, paged attention, every request its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import Scheduler
from overtone.models.base import BaseModel
from support.requests import make_sequence

Row = tuple[Sequence[int], Mapping[str, Any] | None]
"""Prompt and adapter deltas."""


def step_logits(base: BaseModel, rows: Sequence[Row], *, decode: bool = False) -> torch.Tensor:
    """(len(rows), vocabulary) float32: after the last token of every prompt, all in one step.

    decode: the last tokens go through a step of their own, in which every request decodes one token.
    """
    longest = sum(len(ids) for ids, _ in rows)
    config = EngineConfig(
        max_batch=len(rows), max_step_tokens=max(longest, len(rows)), max_context_tokens=longest + 2, page_tokens=4,
        cache_pages=sum(len(ids) // 4 + 2 for ids, _ in rows) + 2, max_queue=len(rows),
    )  # fmt: skip
    scheduler, runner = Scheduler(config), ModelRunner(base, config)
    sequences = [
        make_sequence(f"r{i}", ids[:-1] if decode else ids, 4, adapter=deltas) for i, (ids, deltas) in enumerate(rows)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    logits = torch.empty(0)
    for _ in range(2 if decode else 1):
        plan = scheduler.schedule()
        assert plan is not None
        assert {chunk.sequence for chunk in plan.chunks} == set(sequences)
        assert all(chunk.completes for chunk in plan.chunks)
        found = runner.run(plan)
        order = [chunk.sequence for chunk in plan.chunks]
        logits = torch.stack([found[order.index(sequence)] for sequence in sequences])
        for chunk in plan.chunks:
            scheduler.advance(chunk, sound=True)
            if decode:
                chunk.sequence.output_ids.append(rows[sequences.index(chunk.sequence)][0][-1])
    return logits
