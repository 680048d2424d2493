"""Cancellation, deadlines, a full queue, shutdown: every accepted request has exactly one last event."""

from __future__ import annotations

import threading
import time

import pytest

from overtone.engine.config import EngineConfig
from overtone.engine.types import FinishReason
from overtone.errors import AdapterMemoryFull, Cancelled, DeadlineExceeded, Draining, QueueFull
from support.engines import CONFIG, Gate, held, make_engine
from support.fake_model import FakeModel, fake_greedy
from support.recorder import Recorder
from support.requests import make_request


def test_cancel_running() -> None:
    with held() as (engine, recorder, gate):
        engine.cancel("first")
        gate.open()
        recorder.wait("first")
        assert type(recorder.error("first")) is Cancelled
        # The step under way still brought its token; no step after it did.
        assert recorder.tokens("first") == fake_greedy((1, 2, 3), 1)
        engine.submit(make_request("next", (5,), 2))
        recorder.wait("next")
        assert recorder.stats[-1].pages_used == 0


def test_cancel_waiting_with_a_reason() -> None:
    with held() as (engine, recorder, gate):
        engine.submit(make_request("second", (1,), 5))
        reason = AdapterMemoryFull("no room", retry_after_s=2.0)
        engine.cancel("second", reason)
        gate.open()
        recorder.wait("first", "second")
        assert recorder.error("second") is reason
        assert recorder.tokens("second") == []
        assert recorder.tokens("first") == fake_greedy((1, 2, 3), 20)


def test_cancel_unknown_and_ended() -> None:
    with held() as (engine, recorder, gate):
        engine.cancel("nobody")
        gate.open()
        recorder.wait("first")
        engine.cancel("first")
        engine.submit(make_request("next", (5,), 2))
        recorder.wait("next")
        assert recorder.finish("first").reason is FinishReason.LENGTH
        assert recorder.events("nobody") == []


def test_deadline_of_running_and_waiting() -> None:
    with held(EngineConfig(2, 16, 64, 4, 64, 50)) as (engine, recorder, gate):
        engine.submit(make_request("late", (1,), 60, deadline=time.monotonic() - 1))
        engine.submit(make_request("in time", (1,), 3, deadline=time.monotonic() + 3600))
        gate.open()
        recorder.wait("first", "late", "in time")
        assert type(recorder.error("late")) is DeadlineExceeded
        assert recorder.tokens("late") == []
        assert recorder.finish("in time").completion_tokens == 3


def test_deadline_during_generation() -> None:
    """A request that would take 60 steps ends on the way: its deadline passes while the first step is held."""
    recorder, gate = Recorder(), Gate(FakeModel(CONFIG))
    engine = make_engine(recorder, gate)
    engine.start()
    deadline = time.monotonic() + 0.05
    engine.submit(make_request("r", (1,), 60, deadline=deadline))
    # If the machine was too slow for the first step to begin in time, the request ends before it: as good.
    gate.entered.wait(0.05)
    while time.monotonic() <= deadline:
        time.sleep(0.005)
    gate.open()
    recorder.wait("r")
    engine.stop()
    assert type(recorder.error("r")) is DeadlineExceeded
    assert len(recorder.tokens("r")) <= 1


def test_queue_full() -> None:
    with held(EngineConfig(4, 16, 64, 4, 64, max_queue=3, max_queue_share=1.0)) as (engine, recorder, gate):
        for i in range(3):
            engine.submit(make_request(f"r{i}", (i,), 2))
        with pytest.raises(QueueFull, match="3 requests are waiting") as caught:
            engine.submit(make_request("too many", (1,), 2))
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
        assert caught.value.metadata == {"max_queue": "3"}
        gate.open()
        recorder.wait("first", "r0", "r1", "r2")
        engine.submit(make_request("now", (1,), 2))
        recorder.wait("now")
        assert recorder.events("too many") == []


def test_stop_accepting_lets_what_is_there_finish() -> None:
    with held() as (engine, recorder, gate):
        engine.submit(make_request("queued", (1,), 4))
        engine.stop_accepting()
        with pytest.raises(Draining):
            engine.submit(make_request("refused", (1,), 4))
        gate.open()
        recorder.wait("first", "queued")
        assert recorder.tokens("queued") == fake_greedy((1,), 4)
        assert recorder.finish("first").completion_tokens == 20


def test_stop_ends_everything() -> None:
    with held(EngineConfig(2, 16, 64, 4, 64, 50)) as (engine, recorder, gate):
        names = ["first", *(f"r{i}" for i in range(5))]
        for name in names[1:]:
            engine.submit(make_request(name, (1,), 30))
        stopper = threading.Thread(target=engine.stop)
        stopper.start()

        def refuses() -> bool:
            try:
                engine.submit(make_request("probe", (1,), 1))
            except Draining:
                return True
            return False

        refused_at = time.monotonic() + 60
        accepted = 0
        while not refuses():
            accepted += 1
            assert time.monotonic() < refused_at
        gate.open()
        stopper.join()
        for name in names:
            assert type(recorder.error(name)) is Draining
        assert sum(event.last for event in recorder.events("probe")) == accepted
        assert recorder.stats[-1].running == recorder.stats[-1].waiting == recorder.stats[-1].pages_used == 0
        engine.stop()  # twice does no harm


def test_many_threads_submit_and_cancel() -> None:
    config = EngineConfig(4, 8, 32, page_tokens=4, cache_pages=12, max_queue=1000)
    recorder = Recorder()
    engine = make_engine(recorder, config=config)
    engine.start()

    def client(number: int) -> None:
        for i in range(8):
            name = f"{number}.{i}"
            engine.submit(make_request(name, (number, i), 3 + (number + i) % 6))
            if (number + i) % 5 == 0:
                engine.cancel(name)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{number}.{i}" for number in range(8) for i in range(8)]
    recorder.wait(*names)
    engine.stop()
    for number in range(8):
        for i in range(8):
            last = recorder.last(f"{number}.{i}")
            whole = fake_greedy((number, i), 3 + (number + i) % 6)
            if (number + i) % 5:
                assert last.error is None
                assert recorder.tokens(f"{number}.{i}") == whole
            else:
                assert last.error is None or type(last.error) is Cancelled
                got = recorder.tokens(f"{number}.{i}")
                assert got == whole[: len(got)]
