"""Shared prompt pages: who may share, what is found, and that nothing unsound is ever found."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.engine.types import Request
from overtone.errors import EngineError
from support.deltas import random_adapter
from support.engines import make_engine
from support.fake_model import FakeModel, fake_greedy
from support.recorder import Recorder
from support.requests import make_request, make_sequence
from support.tiny import tiny_base

CONFIG = EngineConfig(4, 64, 256, page_tokens=4, cache_pages=200, max_queue=50)
PROMPT = [(7 * i) % 31 for i in range(22)]


def one_after_another(requests: list[Request], config: EngineConfig = CONFIG) -> Recorder:
    recorder = Recorder()
    engine = make_engine(recorder, config=config)
    engine.start()
    for request in requests:
        engine.submit(request)
        recorder.wait(request.request_id)
    engine.stop()
    return recorder


def found(first: dict[str, Any], second: dict[str, Any], config: EngineConfig = CONFIG) -> int:
    """Of 22 prompt tokens, how many the second of two equal prompts finds."""
    recorder = one_after_another(
        [make_request("first", PROMPT, 3, **first), make_request("second", PROMPT, 3, **second)], config
    )
    assert recorder.finish("first").cached_prompt_tokens == 0
    assert recorder.tokens("first") == recorder.tokens("second") == fake_greedy(PROMPT, 3)
    hits = recorder.finish("second").cached_prompt_tokens
    assert sum(stats.prefix_hit_tokens for stats in recorder.stats) == hits
    assert recorder.stats[-1].pages_used == 0
    return hits


ADAPTER: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("first", "second", "hits"),
    [
        ({}, {}, 20),
        ({"tenant": "a", "cache_salt": "s"}, {"tenant": "a", "cache_salt": "s"}, 20),
        ({"tenant": "a"}, {"tenant": "b"}, 0),
        ({"tenant": "a"}, {}, 0),
        ({"cache_salt": "a"}, {"cache_salt": "b"}, 0),
        # Neither can be made of the other's letters.
        ({"tenant": "ab", "cache_salt": "c"}, {"tenant": "a", "cache_salt": "bc"}, 0),
        ({"tenant": "a"}, {"cache_salt": "a"}, 0),
        ({"priority": 3}, {"priority": -3}, 20),
        ({"adapter": ADAPTER, "adapter_key": "x"}, {"adapter": ADAPTER, "adapter_key": "x"}, 20),
        # Another adapter, or a new version of it under the same name.
        ({"adapter": ADAPTER, "adapter_key": "x"}, {"adapter": ADAPTER, "adapter_key": "y"}, 0),
        ({"adapter": ADAPTER, "adapter_key": "x"}, {}, 0),
        # An adapter without a digest (the warm-up's) shares with nobody, itself included.
        ({"adapter": ADAPTER, "adapter_key": ""}, {"adapter": ADAPTER, "adapter_key": ""}, 0),
        ({"adapter": ADAPTER, "adapter_key": ""}, {}, 0),
        ({}, {"adapter": ADAPTER, "adapter_key": ""}, 0),
    ],
)
def test_who_shares(first: dict[str, Any], second: dict[str, Any], hits: int) -> None:
    assert found(first, second) == hits


def test_switched_off() -> None:
    assert found({}, {}, EngineConfig(4, 64, 256, 4, 200, 50, prefix_cache=False)) == 0


@pytest.mark.parametrize(("length", "hits"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (22, 20)])
def test_the_last_token_is_always_computed(length: int, hits: int) -> None:
    recorder = one_after_another([make_request(name, PROMPT[:length], 2) for name in "ab"])
    assert recorder.finish("b").cached_prompt_tokens == hits
    assert recorder.tokens("b") == fake_greedy(PROMPT[:length], 2)


def test_a_conversation_goes_on_from_the_answer() -> None:
    """The pages of what was generated are found as well."""
    answer = fake_greedy(PROMPT, 12)
    turn = [*PROMPT, *answer, 3, 1]
    recorder = one_after_another([make_request("one", PROMPT, 12), make_request("two", turn, 5)])
    # 33 tokens were computed, the last one sampled was not.
    assert recorder.finish("two").cached_prompt_tokens == 32
    assert recorder.tokens("two") == fake_greedy(turn, 5)


def test_a_burst_shares_what_the_first_computes() -> None:
    """16 requests with one long beginning arrive together: the beginning is computed about once, not 16 times."""
    config = EngineConfig(16, 64, 256, page_tokens=4, cache_pages=600, max_queue=50)
    recorder = Recorder()
    engine = make_engine(recorder, config=config)
    common = [(5 * i) % 29 for i in range(200)]
    requests = [make_request(f"r{i}", [*common, i, 7], 3) for i in range(16)]
    for request in requests:
        engine.submit(request)
    engine.start()
    recorder.wait(*(request.request_id for request in requests))
    engine.stop()
    assert [recorder.tokens(r.request_id) for r in requests] == [fake_greedy(r.prompt_ids, 3) for r in requests]
    computed = sum(stats.prefill_tokens for stats in recorder.stats)
    assert computed < 2 * 202 + 16 * 6
    assert max(stats.pages_used for stats in recorder.stats) > 16 * 10  # pages are set aside when one is admitted
    assert sum(stats.prefix_query_tokens for stats in recorder.stats) == 16 * 202


def test_keys_are_the_chain_that_the_docstring_gives() -> None:
    scheduler = Scheduler(CONFIG)
    sequence = make_sequence("r", PROMPT, tenant="tén", cache_salt="s", adapter=ADAPTER, adapter_key="d" * 64)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.advance(plan.chunks[0], sound=True)
    key = hashlib.sha256()
    for part in (b"overtone prefix cache 1", "tén".encode(), b"s", b"d" * 64):
        key.update(len(part).to_bytes(8, "little") + part)
    expected = [key.digest()]
    for page in range(5):
        tokens = b"".join(t.to_bytes(4, "little") for t in PROMPT[4 * page : 4 * page + 4])
        expected.append(hashlib.sha256(expected[-1] + tokens).digest())
    assert sequence.page_keys == expected
    assert scheduler.pages.cached == 5


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    plain = make_request("a", PROMPT, 3)
    asking = [replace(plain, request_id=name, prompt_logprobs=True) for name in "bc"]
    recorder = one_after_another([asking[0], asking[1], plain])
    assert recorder.finish("c").cached_prompt_tokens == 0
    assert recorder.finish("a").cached_prompt_tokens == 20, "what it computed is published all the same"


def test_hit_pages_are_not_cleared_and_recycled_ones_are() -> None:
    scheduler = Scheduler(EngineConfig(4, 64, 24, 4, 6))
    old: set[int] = set()
    for prompt, hits in ((PROMPT, 0), (PROMPT, 5), (list(range(22)), 0), (PROMPT, 0)):
        sequence = make_sequence("r", prompt)
        scheduler.add(sequence)
        plan = scheduler.schedule()
        assert plan is not None
        assert sequence.computed == 4 * hits
        assert list(plan.fresh_pages) == sequence.pages[hits:]
        assert not old or set(sequence.pages[:hits]) <= old
        scheduler.advance(plan.chunks[0], sound=True)
        old = set(sequence.pages)
        scheduler.remove(sequence)


def test_ends_of_chains_go_first() -> None:
    """Two prompts share 3 pages of 5; what makes room is the least recently used end, never the shared beginning."""
    scheduler = Scheduler(EngineConfig(4, 64, 40, 4, 10))

    def run(prompt: list[int]) -> int:
        sequence = make_sequence("r", prompt)
        scheduler.add(sequence)
        plan = scheduler.schedule()
        assert plan is not None
        hits = sequence.computed // 4
        scheduler.advance(plan.chunks[0], sound=True)
        scheduler.remove(sequence)
        return hits

    one, two = [0] * 12 + [1] * 9, [0] * 12 + [2] * 9
    assert (run(one), run(two)) == (0, 3)
    assert scheduler.pages.cached == 7
    run([9] * 16)  # takes four pages: the three free ones and the end of `one`
    assert scheduler.pages.take_counts().evictions == 1
    assert [len(scheduler.pages.match(make_sequence("r", prompt))) for prompt in (one, two)] == [4, 5]


class Poison:
    """Rows of these requests are NaN from their `after`-th token on."""

    def __init__(self, names: set[str], after: int = 0) -> None:
        self.names, self.after = names, after
        self.model = FakeModel(CONFIG)

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        logits = self.model(plan)
        for row, s in enumerate(chunk.sequence for chunk in plan.chunks if chunk.completes):
            if s.request.request_id in self.names and len(s.output_ids) >= self.after:
                logits[row] = torch.nan
        return logits


@pytest.mark.parametrize("after", [0, 1, 9])
def test_unsound_pages_are_never_found(after: int) -> None:
    """NaN at once, or seen only after pages were published; also those that another request built on them are gone."""
    recorder = Recorder()
    engine = make_engine(recorder, Poison({"bad"}, after))
    engine.start()
    for name, prompt in (("bad", PROMPT), ("next", PROMPT), ("again", PROMPT)):
        engine.submit(make_request(name, prompt, 12))
        recorder.wait(name)
    engine.stop()
    assert type(recorder.error("bad")) is EngineError
    assert recorder.finish("next").cached_prompt_tokens == 0
    assert recorder.finish("again").cached_prompt_tokens == 20
    assert recorder.tokens("again") == fake_greedy(PROMPT, 12)


def test_what_was_built_on_unsound_pages_is_gone_too() -> None:
    scheduler = Scheduler(CONFIG)
    first, second = make_sequence("a", PROMPT), make_sequence("b", [*PROMPT, *range(20)])
    for sequence in (first, second):
        scheduler.add(sequence)
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.advance(plan.chunks[-1], sound=True)
        sequence.output_ids.append(1)
    assert second.cached_tokens == 20
    assert scheduler.pages.cached == 10
    scheduler.pages.withdraw(first)
    assert scheduler.pages.cached == 0
    for _ in range(8):  # the second goes on, and publishes nothing on top of what was withdrawn
        plan = scheduler.schedule()
        assert plan is not None
        for chunk in plan.chunks:
            scheduler.advance(chunk, sound=True)
            chunk.sequence.output_ids.append(1)
    assert scheduler.pages.cached == 0
    scheduler.remove(first)
    scheduler.remove(second)
    assert scheduler.pages.used == 0
    assert scheduler.pages.can_allocate(CONFIG.cache_pages)


def test_an_adapter_full_of_nan_leaves_nothing_behind() -> None:
    """The same prompt again, under the same adapter, another one, and none: on a real model."""
    base, recorder = tiny_base(), Recorder()
    module = "model.layers.0.self_attn.v_proj"
    bad, good = (random_adapter(base.modules, [module], nnz=4, seed=seed) for seed in (0, 1))
    bad.deltas[module].terms[0].core.values.fill_(math.nan)
    bad.deltas[module].terms[0].core.matrix.values().fill_(math.nan)
    engine = Engine(ModelRunner(base, CONFIG).run, base.codec.decode, frozenset(), CONFIG, recorder)
    engine.start()
    for name, adapter in (("b1", bad), ("b2", bad), ("g1", good), ("n1", None), ("g2", good), ("n2", None)):
        deltas = adapter.deltas if adapter else None
        engine.submit(make_request(name, PROMPT, 6, ignore_eos=True, adapter=deltas))
        recorder.wait(name)
        if adapter is bad:
            assert type(recorder.error(name)) is EngineError
            assert recorder.stats[-1].pages_cached == 0
    engine.stop()
    assert [recorder.finish(name).cached_prompt_tokens for name in ("g1", "n1", "g2", "n2")] == [0, 0, 20, 20]
    assert recorder.tokens("g1") == recorder.tokens("g2") != recorder.tokens("n1") == recorder.tokens("n2")
