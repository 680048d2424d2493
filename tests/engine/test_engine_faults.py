"""Failures within a step end the requests that they concern, and the engine lives on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import FinishReason, StepReport
from overtone.errors import AdapterMemoryFull, EngineError
from support.engines import CONFIG, make_engine
from support.fake_model import FakeModel, fake_decode, fake_greedy
from support.recorder import Recorder, serve
from support.requests import make_request


def test_report_may_raise() -> None:
    recorder = Recorder()

    def refuse(report: StepReport) -> None:
        raise RuntimeError("the outside is on fire")

    recorder.on_report = refuse
    serve(make_engine(recorder), recorder, [make_request(f"r{i}", (i,), 5) for i in range(6)])
    for i in range(6):
        assert recorder.tokens(f"r{i}") == fake_greedy((i,), 5)


class Panic(BaseException):
    """As libraries written in Rust raise it: no Exception."""


ERRORS = {"ours": RuntimeError("kernel"), "typed": AdapterMemoryFull("no slot"), "panic": Panic("kernel")}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_failing_run_ends_only_its_batch(error: BaseException) -> None:
    """The second step fails: it has "a" decoding and "b" in prefill; "c" waits for a place and goes on."""
    config = EngineConfig(2, 16, 64, 4, 64, 50)
    model, steps = FakeModel(config), 0

    def run(plan: StepPlan) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise error
        return model(plan)

    recorder = Recorder()
    engine = make_engine(recorder, run, config)
    requests = [make_request("a", (1, 2), 9), make_request("b", range(20), 9), make_request("c", (3,), 9)]
    serve(engine, recorder, requests)
    for name in ("a", "b"):
        assert type(recorder.error(name)) is (type(error) if isinstance(error, AdapterMemoryFull) else EngineError)
        assert "kernel" not in str(recorder.error(name)), "the inner message is not the client's business"
    assert recorder.tokens("a") == fake_greedy((1, 2), 1)
    assert recorder.tokens("c") == fake_greedy((3,), 9)
    assert recorder.stats[-1].pages_used == 0


def test_nan_ends_only_its_row() -> None:
    model = FakeModel(CONFIG)

    def run(plan: StepPlan) -> torch.Tensor:
        logits = model(plan)
        completed = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        for row, sequence in enumerate(completed):
            if sequence.request.request_id == "bad" and len(sequence.output_ids) == 3:
                logits[row] = torch.nan
        return logits

    recorder = Recorder()
    requests = [make_request(name, (i, 5), 8) for i, name in enumerate(["good", "bad", "fine"])]
    serve(make_engine(recorder, run), recorder, requests)
    assert type(recorder.error("bad")) is EngineError
    assert "not finite" in str(recorder.error("bad"))
    assert recorder.tokens("bad") == fake_greedy((1, 5), 3)
    assert recorder.tokens("good") == fake_greedy((0, 5), 8)
    assert recorder.tokens("fine") == fake_greedy((2, 5), 8)


def test_failing_decode_loses_no_request() -> None:
    """Text that cannot be made ends its request, perhaps its batch, but nobody is left without a last event."""
    recorder = Recorder()
    fatal = tuple(fake_greedy((5, 2), 3)[1:])

    def decode(ids: Any) -> str:
        if tuple(ids) in ((31,), fatal):
            raise ValueError("no text")
        return fake_decode(ids)

    # "short" ends in the very step in which "bad" fails; "refused" fails on arrival.
    requests = [make_request("short", (1, 2), 3), make_request("bad", (5, 2), 9)]
    requests += [make_request("refused", (31,), 9), make_request("other", (1,), 9)]
    serve(Engine(FakeModel(CONFIG), decode, frozenset(), CONFIG, recorder), recorder, requests)
    assert recorder.tokens("short") == fake_greedy((1, 2), 3)
    assert recorder.finish("short").reason is FinishReason.LENGTH
    for name in ("bad", "refused"):
        assert type(recorder.error(name)) is EngineError
    recorder.last("other")
    assert recorder.stats[-1].pages_used == 0
