"""Engines over the model without weights, and one that is held at its first step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.scheduler import StepPlan
from support.fake_model import FakeModel, fake_decode
from support.recorder import Recorder, serve
from support.requests import make_request

CONFIG = EngineConfig(
    max_batch=4, max_step_tokens=16, max_context_tokens=64, page_tokens=4, cache_pages=64, max_queue=50
)
Run = Callable[[StepPlan], torch.Tensor]


def make_engine(
    recorder: Any, run: Run | None = None, config: EngineConfig = CONFIG, eos: frozenset[int] = frozenset()
) -> Engine:
    return Engine(run or FakeModel(config), fake_decode, eos, config, recorder)


class Gate:
    """A model that waits at the door of each step until it is let in."""

    def __init__(self, model: Run) -> None:
        self._model = model
        self._open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        self.entered.set()
        assert self._open.wait(60)
        return self._model(plan)

    def open(self) -> None:
        self._open.set()


@contextmanager
def held(config: EngineConfig = CONFIG) -> Iterator[tuple[Engine, Recorder, Gate]]:
    """An engine held at its first step, which runs the request "first" (20 tokens)."""
    recorder, gate = Recorder(), Gate(FakeModel(config))
    engine = make_engine(recorder, gate, config)
    engine.start()
    try:
        engine.submit(make_request("first", (1, 2, 3), 20))
        assert gate.entered.wait(60)
        yield engine, recorder, gate
    finally:
        gate.open()
        engine.stop()


def serve_one(request: Any, **options: Any) -> Recorder:
    recorder = Recorder()
    serve(make_engine(recorder, **options), recorder, [request])
    return recorder
