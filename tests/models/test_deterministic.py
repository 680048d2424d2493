"""Deterministic mode: a request's logits, to the last bit, are those of the request alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from overtone.adapters.resident import make_resident
from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import Request
from overtone.errors import UnsupportedModel
from overtone.kernels import IDENTITY, Delta, LowRankCore, Term
from overtone.models.base import BaseModel, prepare
from overtone.models.blocks import ROWS, RowWise, by_blocks
from overtone.models.packed import PackedLinear
from support.architectures import tiny_architecture
from support.recorder import Recorder, drip
from support.requests import make_request
from support.terms import KINDS, RandomTerms
from support.tiny import tiny_tokenizer

Logits = dict[int, torch.Tensor]
"""By the number of tokens before the one that they choose."""

ALONE = EngineConfig(max_batch=1, max_step_tokens=512, max_context_tokens=200, page_tokens=4, cache_pages=60)
TOGETHER = {
    "roomy": EngineConfig(max_batch=16, max_step_tokens=256, max_context_tokens=200, page_tokens=4, cache_pages=600),
    "cramped": EngineConfig(max_batch=6, max_step_tokens=19, max_context_tokens=200, page_tokens=4, cache_pages=64),
}
"""The cramped one cuts prompts into many chunks and preempts."""


REQUESTS = 2 * len(KINDS) + 6
"""Nearly every adapter below twice."""


def deterministic(name: str = "llama") -> BaseModel:
    return prepare(tiny_architecture(name), tiny_tokenizer(), name, deterministic=True)


def low_rank(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Term:
    a, b = (torch.randn(size, generator=generator) for size in ((rank, shape[1]), (shape[0], rank)))
    return Term(IDENTITY, LowRankCore(a, b, 0.3 / (rank * shape[1]) ** 0.5), IDENTITY)


def adapters(base: BaseModel, seed: int) -> list[Mapping[str, Any] | None]:
    """The base model, LoRA of several ranks, one of each kind, and one of several kinds."""
    made: list[Mapping[str, Any] | None] = [None]
    for i, kinds in enumerate([[1], [2], [8], *([kind] for kind in KINDS), ["low_rank", "dct", "low_rank", "dft"]]):
        rng, generator = random.Random(seed + i), torch.Generator().manual_seed(seed + i)
        deltas = {}
        for name, shape in base.modules.items():
            if rng.random() < 0.6 and not any(extent % 4 for extent in shape):
                terms = RandomTerms(shape, seed + i, strength=0.2)
                made_of = (low_rank(shape, k, generator) if isinstance(k, int) else terms.make(k) for k in kinds)
                deltas[name] = Delta(tuple(made_of), shape)
        made.append(make_resident("x", "x", deltas).deltas)
    return made


def workload(base: BaseModel, seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    choices = adapters(base, seed)
    lengths = [1, 2, 5, 17, 40, 63, 64, 65, 90, 130]
    return [
        make_request(
            f"r{i}",
            [rng.randrange(1, base.vocab_size) for _ in range(rng.choice(lengths))],
            rng.randint(3, 14),
            adapter=choices[i % len(choices)],
            ignore_eos=True,
        )
        for i in range(count)
    ]


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
    recorder.on_report = drip(engine, requests[early:], every=2)
    for request in requests[:early]:
        engine.submit(request)
    engine.start()
    try:
        recorder.wait(*(request.request_id for request in requests))
    finally:
        engine.stop()
    return seen, recorder


def different(a: Logits, b: Logits) -> list[int]:
    assert a.keys() == b.keys()
    return [place for place, row in a.items() if not torch.equal(row, b[place])]


def check_together(base: BaseModel, config: EngineConfig, work: Sequence[Request]) -> Recorder:
    together, recorder = logits_of(base, config, work, early=4)
    for request in work:
        alone, _ = logits_of(base, ALONE, [request], early=1)
        wrong = different(alone[request.request_id], together[request.request_id])
        assert not wrong, f"{request.request_id}, prompt of {len(request.prompt_ids)}: after {wrong} tokens"
    return recorder


@pytest.mark.parametrize("config", TOGETHER)
@pytest.mark.parametrize("seed", [0, 100])
def test_a_request_has_the_logits_that_it_has_alone(config: str, seed: int) -> None:
    base = deterministic()
    recorder = check_together(base, TOGETHER[config], workload(base, seed, REQUESTS))
    preempted = sum(stats.preemptions for stats in recorder.stats)
    assert (preempted > 0) == (config == "cramped")
    assert max(stats.chunks for stats in recorder.stats) >= 4


@pytest.mark.parametrize(
    "name", ["qwen2-window", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"]
)
def test_other_architectures(name: str) -> None:
    base = deterministic(name)
    check_together(base, TOGETHER["cramped"], workload(base, 7, 8))


def test_the_ordinary_mode_does_differ() -> None:
    base = prepare(tiny_architecture("llama"), tiny_tokenizer(), "llama")
    work = workload(base, 0, REQUESTS)
    together, _ = logits_of(base, TOGETHER["cramped"], work, early=4)
    alone = {request.request_id: logits_of(base, ALONE, [request], early=1)[0] for request in work}
    assert any(different(alone[name][name], together[name]) for name in alone)
