"""Logits of whole generations, to be compared bit by bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import Request
from overtone.models.base import BaseModel
from support.recorder import Recorder, serve

Logits = dict[int, torch.Tensor]
"""By the number of tokens before the one that they choose."""


def logits_of(
    base: BaseModel, config: EngineConfig, requests: Sequence[Request], early: int
) -> tuple[dict[str, Logits], Recorder]:
    """`early` requests are there from the start, each other one comes two steps after the one before."""
    runner, recorder = ModelRunner(base, config), Recorder()
    seen: dict[str, Logits] = defaultdict(dict)

    def run(plan: StepPlan) -> torch.Tensor:
        logits = runner.run(plan)
        completing = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        for sequence, row in zip(completing, logits, strict=False):
            seen[sequence.request.request_id][sequence.num_tokens] = row.clone()
        return logits

    engine = Engine(run, base.codec.decode, base.eos_token_ids, config, recorder)
    serve(engine, recorder, requests, early=early)
    return seen, recorder


def different(a: Logits, b: Logits) -> list[int]:
    assert a.keys() == b.keys()
    return [place for place, row in a.items() if not torch.equal(row, b[place])]
