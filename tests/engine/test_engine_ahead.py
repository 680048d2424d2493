"""Steps that are begun before the last one's tokens are known: what comes out is what comes out of one step at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.flight import Choice
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import FinishReason
from overtone.errors import EngineError
from support.engines import CONFIG
from support.fake_model import VOCAB, FakeModel, fake_decode, fake_greedy, fake_logits
from support.recorder import Recorder, serve
from support.requests import make_request


class AheadModel(FakeModel):
    """The model without weights, whose chosen tokens only it knows until they are read."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.begun = 0

    def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
        if tokens is None:
            return self(plan)
        self.begun += 1
        self.clear(plan.fresh_pages)
        rows = []
        for chunk, token in zip(plan.decodes, tokens.tolist(), strict=True):
            position = chunk.sequence.computed + 1
            self.write(chunk.sequence.pages, position, token)
            rows.append(self.answer(chunk.sequence.pages, position + 1))
        return torch.stack(rows)

    def choose(self, logits: torch.Tensor) -> Choice | None:
        chosen = logits.argmax(-1)
        return Choice(chosen, lambda: (chosen.tolist(), logits.amax(-1).isfinite().tolist()))


def engine_ahead(recorder: Recorder, model: AheadModel, config: EngineConfig, eos: frozenset[int]) -> Engine:
    return Engine(model.run, fake_decode, eos, config, recorder, ahead=model)


requests_of = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 12), st.sampled_from(["greedy", "greedy", "greedy", "drawn", "stop"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    wanted=requests_of, early=st.integers(1, 4), pages=st.integers(8, 40), eos=st.booleans(), seed=st.integers(0, 99)
)
def test_as_one_step_after_another(
    wanted: list[tuple[int, int, str]], early: int, pages: int, eos: bool, seed: int
) -> None:
    """Requests that come while others run, end at their length, at the model's end token or at a stop string, some drawn
    instead of greedy, with pages for few of them."""
    config = replace(CONFIG, cache_pages=pages, max_context_tokens=32, max_batch=3)
    rng, ending = random.Random(seed), frozenset({3, 7} if eos else ())
    requests = []
    for i, (length, new, kind) in enumerate(wanted):
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        options = {"temperature": 0.8, "seed": i} if kind == "drawn" else {}
        stop = (fake_decode(fake_greedy(prompt, new)[-2:]),) if kind == "stop" else ()
        requests.append(make_request(f"r{i}", prompt, new, stop=stop, **options))

    def tokens(ahead: bool) -> list[tuple[list[int], FinishReason, str]]:
        recorder, model = Recorder(), AheadModel(config)
        engine = (
            engine_ahead(recorder, model, config, ending)
            if ahead
            else Engine(FakeModel(config), fake_decode, ending, config, recorder)
        )
        serve(engine, recorder, requests, early=early)
        assert engine.pages.used == 0
        names = [request.request_id for request in requests]
        return [(recorder.tokens(name), recorder.finish(name).reason, recorder.text(name)) for name in names]

    assert tokens(ahead=True) == tokens(ahead=False)


def test_steps_are_begun_ahead() -> None:
    """One after another as soon as nobody waits; also while the batch is full and others wait for a place."""
    config = replace(CONFIG, max_batch=2)
    recorder, model = Recorder(), AheadModel(config)
    engine = engine_ahead(recorder, model, config, frozenset())
    requests = [make_request(f"r{i}", [i + 1], 10) for i in range(3)]
    serve(engine, recorder, requests)
    assert [recorder.tokens(f"r{i}") for i in range(3)] == [fake_greedy([i + 1], 10) for i in range(3)]
    assert model.begun >= 14


def test_a_request_cancelled_while_its_step_is_under_way() -> None:
    """It ends once; the others go on; its pages come back."""
    recorder, model = Recorder(), AheadModel(CONFIG)
    engine = engine_ahead(recorder, model, CONFIG, frozenset())
    requests = [make_request(f"r{i}", [i + 1], 20) for i in range(3)]
    recorder.on_report = lambda report: engine.cancel("r1") if model.begun == 5 else None
    serve(engine, recorder, requests)
    assert recorder.error("r1").message == "the request was cancelled"
    for i in (0, 2):
        assert recorder.tokens(f"r{i}") == fake_greedy([i + 1], 20)
    assert engine.pages.used == 0


@pytest.mark.parametrize("where", ["run", "read"])
def test_a_step_that_fails_ahead(where: str) -> None:
    """Its requests end with an error, and tokens that were chosen before are told; the engine goes on."""
    recorder = Recorder()

    class Failing(AheadModel):
        def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
            found = super().run(plan, tokens)
            if where == "run" and self.begun == 3 and tokens is not None:
                raise RuntimeError("out of everything")
            return found

        def choose(self, logits: torch.Tensor) -> Choice | None:
            choice = super().choose(logits)
            if where == "read" and self.begun == 3 and choice is not None:
                return Choice(choice.tokens, self._fail)
            return choice

        def _fail(self) -> tuple[list[int], list[bool]]:
            raise RuntimeError("the device is gone")

    model = Failing(CONFIG)
    engine = engine_ahead(recorder, model, CONFIG, frozenset())
    engine.start()
    engine.submit(make_request("first", [1], 20))
    recorder.wait("first")
    assert isinstance(recorder.error("first"), EngineError)
    told = recorder.tokens("first")
    assert told == fake_greedy([1], 20)[: len(told)]
    assert len(told) >= 3
    engine.submit(make_request("second", [2], 5))
    recorder.wait("second")
    engine.stop()
    assert recorder.tokens("second") == fake_greedy([2], 5)
    assert engine.pages.used == 0


def test_logits_that_are_not_finite() -> None:
    recorder = Recorder()

    class Broken(AheadModel):
        def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
            found = super().run(plan, tokens)
            for row, chunk in enumerate(plan.decodes):
                if chunk.sequence.request.request_id == "bad" and self.begun >= 4:
                    found[row] = torch.nan
            return found

    engine = engine_ahead(recorder, Broken(CONFIG), CONFIG, frozenset())
    serve(engine, recorder, [make_request("bad", [1], 20), make_request("good", [2], 20)])
    assert "not finite" in recorder.error("bad").message
    assert recorder.tokens("good") == fake_greedy([2], 20)
    assert float(fake_logits([1]).amax()) < float("inf")
