"""Who may wait, and that ending requests costs no scan: queued tokens, deadlines in a heap, tenants in the engine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.config import EngineConfig
from overtone.engine.deadlines import Deadlines
from overtone.errors import ConfigError, QueueFull
from support.engines import held
from support.fake_model import fake_greedy
from support.requests import make_request, make_sequence


def test_queued_tokens_are_limited() -> None:
    config = EngineConfig(1, 16, 64, 4, 64, max_queue=50, max_queue_tokens=60, max_queue_share=1.0)
    with held(config) as (engine, recorder, gate):
        engine.submit(make_request("a", range(20), 10))
        engine.submit(make_request("b", range(20), 10))
        with pytest.raises(QueueFull, match="max_queue_tokens") as caught:
            engine.submit(make_request("c", (1,), 1))
        assert caught.value.metadata == {"max_queue_tokens": "60"}
        assert caught.value.retry_after_s is not None
        gate.open()
        recorder.wait("first", "a", "b")
        # Alone, any request may wait, even one above the limit.
        engine.submit(make_request("d", range(30), 34))
        recorder.wait("d")
        assert recorder.tokens("d") == fake_greedy(range(30), 34)


def test_tenants_alternate_in_the_engine() -> None:
    """Ten requests of one tenant are queued when another's first arrives: it is the next but one to end."""
    with held(EngineConfig(1, 16, 64, 4, 64, max_queue=50)) as (engine, recorder, gate):
        names = [f"a{i}" for i in range(10)]
        for name in names:
            engine.submit(make_request(name, (1, 2), 4, tenant="a"))
        engine.submit(make_request("b", (1, 2), 4, tenant="b"))
        ended: list[str] = []
        recorder.on_report = lambda report: ended.extend(e.request_id for e in report.events if e.last)
        gate.open()
        recorder.wait("b", *names)
        assert ended.index("b") <= 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_checked(weight: float) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(tenant_weights={"a": weight})
    assert caught.value.field == "tenant_weight"


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.one_of(st.tuples(st.just("add"), st.integers(0, 30)), st.tuples(st.just("end"), st.integers(0, 99)),
                          st.tuples(st.just("now"), st.integers(0, 3))), max_size=80))  # fmt: skip
def test_deadlines_against_a_list(actions: list[tuple[str, int]]) -> None:
    deadlines, alive, now = Deadlines(), [], 0.0
    for what, number in actions:
        if what == "add":
            # Every third has none.
            sequence = make_sequence("r", (1,), deadline=now + number if number % 3 else None)
            deadlines.add(sequence)
            alive.append(sequence)
        elif what == "end" and alive:
            deadlines.remove(alive.pop(number % len(alive)))
        elif what == "now":
            now += number
            over = [s for s in alive if s.request.deadline is not None and s.request.deadline <= now]
            assert deadlines.passed(now) == sorted(over, key=lambda s: s.request.deadline)
            alive = [s for s in alive if s not in over]


def test_ended_requests_do_not_pile_up_until_their_deadline() -> None:
    deadlines = Deadlines()
    for _ in range(2000):
        sequence = make_sequence("r", (1,), deadline=1e9)
        deadlines.add(sequence)
        deadlines.remove(sequence)
    assert len(deadlines) <= 64
