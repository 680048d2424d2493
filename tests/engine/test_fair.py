"""What a flow owes when it comes back: the fair queue against one that forgets nothing, and what it may remember."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine import fair
from overtone.engine.config import EngineConfig
from overtone.engine.fair import FairQueue
from overtone.engine.scheduler import Scheduler
from overtone.engine.sequence import Sequence
from support.requests import make_sequence
from support.slow_scheduler import Job, SlowScheduler

WEIGHTS = {"a": 4.0, "b": 0.5}


def times(queue: FairQueue) -> dict[tuple[Any, ...], float]:
    tenants: dict[tuple[Any, ...], float] = {(0, name): tenant.time for name, tenant in queue._tenants.items()}
    for name, tenant in queue._tenants.items():
        tenants |= {(0, name, adapter): flow.time for adapter, flow in tenant.flows.items()}
    return tenants


arrival = st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "x", "y"]))
service = st.tuples(st.integers(0, 99), st.integers(0, 9))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    sweep=st.sampled_from([1, 2, 64]), actions=st.lists(st.one_of(arrival, service, st.integers(0, 99)), max_size=80)
)
def test_forgetting_changes_nothing(sweep: int, actions: list[Any]) -> None:
    """However often it is swept: whoever comes back starts where one that remembers all lets it start."""
    with mock.patch.object(fair, "_SWEEP", sweep):
        queue, slow = FairQueue(WEIGHTS), SlowScheduler(EngineConfig(tenant_weights=WEIGHTS))
        alive: list[tuple[Sequence, Job]] = []
        for action in actions:
            if isinstance(action, tuple) and isinstance(action[0], str):
                tenant, adapter = action
                alive.append((make_sequence(tenant=tenant, adapter_key=adapter), Job("", 0, tenant, "", adapter, [])))
                queue.add(alive[-1][0])
                slow.add(alive[-1][1])
                queue.take(alive[-1][0])
            elif alive and isinstance(action, tuple):
                sequence, job = alive[action[0] % len(alive)]
                queue.charge(sequence, action[1])
                job.charged, job.tokens = 0, [0] * action[1]
                slow.charge(job)
            elif alive:
                sequence, job = alive.pop(action % len(alive))
                queue.leave(sequence)
                slow.remove(job)
            assert times(queue) == slow.clocks
            assert queue.remembered <= len(slow.left) or sweep > 1
        for sequence, _ in alive:
            queue.leave(sequence)
        assert queue.flows == queue.remembered == 0


ONE = EngineConfig(1, 16, 16, 4, 16, prefix_cache=False)


def serve(scheduler: Scheduler) -> str:
    """Runs one prompt of a batch of one to its end."""
    plan = scheduler.schedule()
    assert plan is not None
    (chunk,) = plan.chunks
    assert chunk.completes
    scheduler.advance(chunk, sound=True)
    scheduler.remove(chunk.sequence)
    return chunk.sequence.request.request_id


@pytest.mark.parametrize("level", ["tenant", "adapter_key"])
def test_one_request_after_another_escapes_no_debt(level: str) -> None:
    """Four flows always have something waiting. Another sends its next request, four times as long, whenever its last has
    ended: it gets its fifth of the tokens, so the others are served four times as often."""
    scheduler, served = Scheduler(ONE), dict.fromkeys("abcde", 0)

    def send(name: str) -> None:
        length = 12 if name == "e" else 3
        scheduler.add(make_sequence(name, [1] * length, 1, **{level: name}))

    for name in "abcd" * 2 + "e":
        send(name)
    for _ in range(340):
        name = serve(scheduler)
        served[name] += 1
        send(name)
    assert served["e"] == pytest.approx(20, abs=1)
    assert all(served[name] == pytest.approx(80, abs=1) for name in "abcd")


def test_nobody_owes_anything_once_all_is_done() -> None:
    scheduler = Scheduler(ONE)
    for name in ("a", "b"):
        scheduler.add(make_sequence(name, [1] * 12, 1, tenant=name))
        serve(scheduler)
    for name in ("b", "a"):
        scheduler.add(make_sequence(name, [1] * 3, 1, tenant=name))
    assert [serve(scheduler), serve(scheduler)] == ["b", "a"]


@pytest.mark.parametrize("level", ["tenant", "adapter_key"])
def test_what_is_remembered_is_bounded(level: str) -> None:
    """Thousands come and go beside one that stays. If it is served, they are forgotten as it catches up; if it is not, the
    most indebted are remembered."""
    queue = FairQueue({})
    stays = make_sequence(**{level: "stays"})
    queue.add(stays)

    def visit(i: int) -> None:
        guest = make_sequence(**{level: f"g{i}"})
        queue.add(guest)
        queue.take(guest)
        queue.charge(guest, 1 + i % 50)
        queue.leave(guest)

    for i in range(3000):
        visit(i)
        queue.charge(stays, 1)
        assert queue.remembered <= fair._SWEEP + 2 * 50
    with mock.patch.object(fair, "_REMEMBERED", 20):
        for i in range(1000):
            visit(i)
        assert queue.remembered <= fair._SWEEP + 2 * 20
        queue.take(stays)
        queue.leave(stays)
    assert queue.remembered == 0
