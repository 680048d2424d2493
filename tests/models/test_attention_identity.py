"""The whole engine on tiny models gives transformers' own greedy tokens, each prompt alone, whatever shares the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.models.base import prepare
from support.recorder import Recorder, serve
from support.requests import make_request
from support.tiny import KINDS, tiny_config, tiny_model, tiny_tokenizer

# Pages for about three of the requests below: some are preempted.
CRAMPED = EngineConfig(max_batch=5, max_step_tokens=7, max_context_tokens=64, page_tokens=4, cache_pages=18)
ROOMY = EngineConfig(max_batch=16, max_step_tokens=256, max_context_tokens=64, page_tokens=4, cache_pages=300)


def greedy_alone(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """By transformers' `generate`; ends with an end-of-sequence token if one comes."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def workload(vocab: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens): from one token to several chunks of a prompt."""
    rng = random.Random(seed)
    lengths = [1, 2, 4, 5, 8, 13, 21, 34, 3, 17, 6, 28]
    return [([rng.randrange(1, vocab) for _ in range(n)], rng.randint(4, 24)) for n in lengths]


def generate_together(
    model: Any, config: EngineConfig, work: Sequence[tuple[Sequence[int], int]], early: int
) -> Recorder:
    """`early` requests are there from the start, each other one comes two steps after the one before."""
    base = prepare(model, tiny_tokenizer(), "tiny")
    recorder = Recorder()
    runner = ModelRunner(base, config)
    engine = Engine(runner.run, base.codec.decode, base.eos_token_ids, config, recorder)
    requests = [make_request(f"r{i}", prompt, count) for i, (prompt, count) in enumerate(work)]
    serve(engine, recorder, requests, early=early)
    return recorder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CRAMPED, ROOMY], ids=["cramped", "roomy"])
def test_together_is_alone(kind: str, config: EngineConfig) -> None:
    model = tiny_model(kind)
    untouched = copy.deepcopy(model)
    work = workload(model.config.vocab_size, seed=len(kind))
    recorder = generate_together(model, config, work, early=4)
    expected = [greedy_alone(untouched, prompt, count) for prompt, count in work]
    assert [recorder.tokens(f"r{i}") for i in range(len(work))] == expected
    assert all(recorder.finish(f"r{i}").completion_tokens == len(tokens) for i, tokens in enumerate(expected))
    # The comparison means something: the models say many different things, and the cramped cache did preempt.
    assert len({token for tokens in expected for token in tokens}) > 40
    preempted = sum(stats.preemptions for stats in recorder.stats)
    assert (preempted > 0) == (config is CRAMPED)
    assert max(stats.chunks for stats in recorder.stats) >= 3


def test_end_of_sequence_ends_where_transformers_ends() -> None:
    model = tiny_model()
    work = workload(model.config.vocab_size, seed=3)
    plain = [greedy_alone(model, prompt, count) for prompt, count in work]
    # A token that does come, as end of sequence.
    eos = plain[5][2]
    for owner in (model.config, model.generation_config):
        owner.eos_token_id = eos
    untouched = copy.deepcopy(model)
    recorder = generate_together(model, ROOMY, work, early=12)
    expected = [greedy_alone(untouched, prompt, count) for prompt, count in work]
    assert expected != plain
    assert [recorder.tokens(f"r{i}") for i in range(len(work))] == expected
    assert recorder.finish("r5").reason.value == "eos"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 2.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_static_rope(rope: dict[str, Any]) -> None:
    model = tiny_model(rope_parameters=rope)
    assert tiny_config(rope_parameters=rope).rope_parameters["rope_type"] == rope["rope_type"]
    untouched = copy.deepcopy(model)
    work = workload(model.config.vocab_size, seed=8)[:8]
    recorder = generate_together(model, CRAMPED, work, early=8)
    assert [recorder.tokens(f"r{i}") for i in range(8)] == [greedy_alone(untouched, *item) for item in work]
