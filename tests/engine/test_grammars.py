"""Guides in use: many rows at once, generations that are put off and go on, grammars that cost too much."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.grammars import GrammarCompiler, GrammarMatcher, GuideSpec, MaskFiller
from overtone.engine.guides import unpack
from overtone.engine.runner import ModelRunner
from overtone.engine.types import FinishReason, Request
from overtone.errors import EngineError
from overtone.models.base import BaseModel
from support.recorder import Recorder, serve
from support.requests import make_request
from support.tiny import tiny_base

CODE = r"([a-f]{2}-){3}[0-9]{2}"
COSTLY = r"([^ab]|a[^b]{0,30}|.{0,60}aa){0,900}z"
"""Compiles in a moment; every further "a" adds states, until the matcher gives up."""


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def compiler(base: BaseModel) -> GrammarCompiler:
    return GrammarCompiler(base.codec.serialized(), base.vocab_size, base.eos_token_ids)


def run(base: BaseModel, requests: list[Request], pages: int) -> Recorder:
    config = EngineConfig(4, 64, 96, page_tokens=4, cache_pages=pages)
    recorder = Recorder()
    engine = Engine(ModelRunner(base, config).run, base.codec.decode, base.eos_token_ids, config, recorder)
    serve(engine, recorder, requests)
    return recorder


def test_a_guide_survives_preemption(base: BaseModel, compiler: GrammarCompiler) -> None:
    """With too few pages guided generations are put off in the middle of their texts: what they say is what they say with
    pages enough, and matches from its first character to its last."""
    code = compiler.compile(GuideSpec("regex", CODE))
    schema = {"properties": {"kind": {"enum": ["ab", "abc"]}}, "required": ["kind"], "additionalProperties": False}
    thing = compiler.compile(GuideSpec("json_schema", json.dumps({"type": "object", **schema})))
    requests = [
        make_request(f"r{i}", range(5 + i, 45 + i), 40, temperature=float(i % 3), seed=i, guide=(code, thing)[i % 2])
        for i in range(8)
    ]
    plenty, tight = run(base, requests, 200), run(base, requests, 25)
    assert sum(stats.preemptions for stats in plenty.stats) == 0
    assert sum(stats.preemptions for stats in tight.stats) > 3
    for i in range(8):
        assert tight.tokens(f"r{i}") == plenty.tokens(f"r{i}")
        assert tight.finish(f"r{i}").reason is FinishReason.EOS
        text = tight.text(f"r{i}")
        assert json.loads(text)["kind"] in ("ab", "abc") if i % 2 else re.fullmatch(CODE, text)


def test_a_guide_survives_giving_way_to_a_higher_priority(base: BaseModel, compiler: GrammarCompiler) -> None:
    guide = compiler.compile(GuideSpec("regex", CODE))
    low = [make_request(f"low{i}", range(9), 40, temperature=1.0, seed=i, guide=guide, priority=-1) for i in range(4)]
    config = EngineConfig(4, 64, 96, page_tokens=4, cache_pages=200)
    recorder = Recorder()
    engine = Engine(ModelRunner(base, config).run, base.codec.decode, base.eos_token_ids, config, recorder)

    def on_report(report: Any) -> None:
        if len(recorder.stats) == 6:
            engine.submit_all([make_request(f"high{i}", (i,), 3, ignore_eos=True) for i in range(3)])

    recorder.on_report = on_report
    engine.submit_all(low)
    engine.start()
    recorder.wait("high0", "high1", "high2", *(request.request_id for request in low))
    engine.stop()
    assert sum(stats.preemptions for stats in recorder.stats) == 3
    alone = run(base, low, 200)
    assert [recorder.tokens(f"low{i}") for i in range(4)] == [alone.tokens(f"low{i}") for i in range(4)]


def test_a_guide_that_costs_too_much_fails_alone(base: BaseModel, compiler: GrammarCompiler) -> None:
    guide = compiler.compile(GuideSpec("regex", COSTLY))
    (a,) = base.codec.encode("a")
    costly = make_request("costly", range(5), 80, guide=guide, logit_bias=((a, 100.0),))
    others = [make_request(f"other{i}", range(i, 9), 20, ignore_eos=True) for i in range(2)]
    others.append(make_request("guided", range(9), 20, guide=compiler.compile(GuideSpec("regex", CODE))))
    recorder, alone = run(base, [costly, *others], 200), run(base, others, 200)
    error = recorder.error("costly")
    assert isinstance(error, EngineError)
    assert "too complex" in error.message
    assert 10 < len(recorder.tokens("costly")) < 80
    for request in others:
        assert recorder.tokens(request.request_id) == alone.tokens(request.request_id)


@pytest.mark.parametrize("count", [1, 15, 16, 40])
def test_rows_at_once_are_rows_one_by_one(base: BaseModel, compiler: GrammarCompiler, count: int) -> None:
    """Matchers of two guides, each at another place; one of them has gone wrong."""
    guides = [compiler.compile(GuideSpec("regex", CODE)), compiler.compile(GuideSpec("json_object", ""))]
    texts = ["ab-cd-ef-12", '{"a": [1, 2, {"b": "text"}], "c": null}']
    matchers = []
    for row in range(count):
        matcher = guides[row % 2].matcher()
        assert isinstance(matcher, GrammarMatcher)
        assert matcher.follow(base.codec.encode(texts[row % 2][: row % 12]))
        matchers.append(matcher)
    if count > 1:
        assert not matchers[-1].follow(base.codec.encode("é" * 20))
    words = -(-base.vocab_size // 32)
    one_by_one, at_once = (np.zeros((count, words), dtype=np.int32) for _ in range(2))
    MaskFiller(threads=1).fill([matcher.place for matcher in matchers], one_by_one)
    MaskFiller(threads=2).fill([matcher.place for matcher in matchers], at_once)
    sound = slice(0, max(1, count - 1))
    np.testing.assert_array_equal(at_once[sound], one_by_one[sound])
    assert sound == slice(0, 1) or one_by_one[0].tobytes() != one_by_one[1].tobytes()
    assert guides[0].fill(matchers, at_once) == [True] * (count - 1) + [count == 1]


def test_an_ambiguous_grammar_gives_up_before_it_is_slow(base: BaseModel, compiler: GrammarCompiler) -> None:
    """Its items grow with every token: the limit on them ends it, where each mask would come to take 0.4 s."""
    guide = compiler.compile(GuideSpec("grammar", 'start: s\ns: s s | s s s | "a"'))
    (a,) = base.codec.encode("a")
    matcher, rows = guide.matcher(), np.zeros((1, -(-base.vocab_size // 32)), dtype=np.int32)
    told = []
    while len(told) < 300 and (not told or told[-1]):
        assert matcher.follow([a] * len(told))
        told.append(guide.fill([matcher], rows)[0])
        assert not told[-1] or unpack(rows, base.vocab_size)[0, a]
    assert 100 < len(told) < 300
