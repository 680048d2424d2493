"""The scheduler against a slow one that says its rules plainly, under random traffic; fairness, priorities, budgets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.config import EngineConfig
from overtone.engine.scheduler import Scheduler
from support.requests import make_sequence
from support.traffic_of_sequences import SequenceTraffic

SEEDS = range(40)


@st.composite
def configs(draw: Any) -> EngineConfig:
    page_tokens = draw(st.sampled_from([1, 2, 4]))
    context, batch = draw(st.integers(4, 24)), draw(st.integers(1, 6))
    return EngineConfig(
        max_batch=batch,
        max_step_tokens=batch + draw(st.sampled_from([0, 1, 5, 30])),
        max_context_tokens=context,
        page_tokens=page_tokens,
        cache_pages=-(-context // page_tokens) + draw(st.sampled_from([0, 0, 1, 3, 10])),
        prefix_cache=draw(st.booleans()),
        # Powers of two: the virtual times are exact.
        tenant_weights=draw(st.dictionaries(st.sampled_from("ab"), st.sampled_from([0.5, 2.0, 4.0]))),
    )


arrivals = st.tuples(
    st.just("add"),
    st.integers(0, 2),  # the prompt's beginning
    st.integers(0, 100),  # its length
    st.integers(0, 100),  # how much of it is common to all with this beginning
    st.integers(0, 100),  # new tokens
    st.sampled_from("aabc"),
    st.sampled_from(["", "", "x", "y", None]),
    st.sampled_from([0, 0, 0, 3, -1]),
    st.sampled_from(["", "", "", "salt"]),
)
others = st.tuples(st.sampled_from(["step", "step", "step", "cancel", "unsound"]), st.integers(0, 100))


def act(traffic: SequenceTraffic, action: tuple[Any, ...]) -> None:
    alive = list(traffic.alive)
    if action[0] == "cancel" and alive:
        traffic.end(alive[action[1] % len(alive)])
    elif action[0] == "unsound":
        traffic.step(unsound=True)
    elif action[0] == "step":
        traffic.step()
    elif action[0] == "add":
        _, stem, length, common, new, tenant, adapter, priority, salt = action
        context = traffic.config.max_context_tokens
        length = 1 + length % (context - 1)
        common = common % (length + 1)
        prompt = [10 * stem + 100 * (i >= common) * (1 + traffic.arrived) for i in range(length)]
        new = 1 + new % (context - length)
        traffic.add(prompt, new, tenant=tenant, adapter=adapter, priority=priority, salt=salt)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(config=configs(), actions=st.lists(st.one_of(arrivals, others), max_size=60))
def test_against_the_slow_scheduler(config: EngineConfig, actions: list[tuple[Any, ...]]) -> None:
    traffic = SequenceTraffic(config)
    for action in actions:
        act(traffic, action)
    traffic.drain()
    assert traffic.scheduler.pages.used == traffic.scheduler.flows == traffic.scheduler.load.tokens == 0
    assert traffic.scheduler.schedule() is None


def busy(seed: int) -> SequenceTraffic:
    """Longer traffic than hypothesis makes, and more of what is rare."""
    rng = random.Random(seed)
    context, page = rng.randint(6, 24), rng.choice([1, 2, 4])
    batch = rng.randint(2, 6)
    pages = -(-context // page) + rng.choice([0, 1, 3])
    traffic = SequenceTraffic(EngineConfig(batch, batch + rng.choice([0, 3, 20]), context, page, pages))
    for _ in range(120):
        kind = rng.choices(["add", "step", "cancel", "unsound"], [5, 20, 1, 0.5])[0]
        numbers = [rng.randint(0, 100) for _ in range(3)]
        whose = (rng.choice("ab"), rng.choice(["", "x"]), rng.choice([0, 0, 0, 2]), "")
        act(traffic, ("add", rng.randint(0, 1), *numbers, *whose) if kind == "add" else (kind, numbers[0]))
    traffic.drain()
    return traffic


def test_against_the_slow_scheduler_for_long() -> None:
    played = [busy(seed) for seed in SEEDS]
    # The traffic is hard enough: what is rare does occur.
    for what in ("preemptions", "hit_tokens", "evictions"):
        assert sum(getattr(traffic, what) > 0 for traffic in played) > len(SEEDS) // 2, what
    assert sum(traffic.slow.displaced > 0 for traffic in played) > len(SEEDS) // 2


def backlogged(traffic: SequenceTraffic, rng: random.Random, flows: list[tuple[str, str]]) -> None:
    """At least three requests of each flow wait, or come to."""
    for tenant, adapter in flows:
        while sum(s.request.tenant == tenant and s.request.adapter_key == adapter for s in traffic.alive) < 12:
            length = rng.choice([1, 3, 20] if adapter == "x" else [5, 6])
            new = rng.randint(1, 40 - length)
            traffic.add([1000 * traffic.arrived + i for i in range(length)], new, tenant=tenant, adapter=adapter)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_difference_in_service_is_bounded(weight: float) -> None:
    """Flows that always wait: weighted service differs by no more than fair.py says, however long it goes on."""
    config = EngineConfig(4, 24, 40, 4, 60, prefix_cache=False, tenant_weights={"a": weight})
    traffic, rng = SequenceTraffic(config), random.Random(3)
    flows = [("a", "x"), ("a", "y"), ("b", "x")]
    bound = config.max_batch * config.max_context_tokens
    for _ in range(1200):
        backlogged(traffic, rng, flows)
        traffic.step()
        x, y, other = (traffic.served.get(flow, 0) for flow in flows)
        # A prompt is charged when it is admitted and served later: once more the same bound.
        assert abs(x - y) <= 2 * bound
        assert abs((x + y) / weight - other) <= 2 * bound / min(weight, 1.0)
    assert min(x, y, other) > 6 * bound / 4, "the bound means something: far more than it was served"
    assert (x + y) / other == pytest.approx(weight, rel=0.15)
    assert traffic.preemptions == 0


def test_what_was_recomputed_is_not_charged() -> None:
    """With too few pages one flow is preempted again and again; it still gets its half of the tokens that count."""
    config = EngineConfig(4, 24, 40, 4, 14, prefix_cache=False)
    traffic, rng = SequenceTraffic(config), random.Random(5)
    for _ in range(600):
        backlogged(traffic, rng, [("a", "x"), ("b", "x")])
        traffic.step()
    assert traffic.preemptions > 20
    times = [time for key, time in traffic.slow.clocks.items() if len(key) == 2]
    assert max(times) - min(times) <= config.max_batch * config.max_context_tokens


def order_of_admission(scheduler: Scheduler) -> list[str]:
    """Names in the order in which a batch of one takes them; each says one token."""
    names = []
    while (plan := scheduler.schedule()) is not None:
        for chunk in plan.chunks:
            completes = chunk.completes
            scheduler.advance(chunk, sound=True)
            if completes:
                names.append(chunk.sequence.request.request_id)
                scheduler.remove(chunk.sequence)
    return names


ONE = EngineConfig(1, 16, 16, 4, 16)


def test_no_adapter_starves_another() -> None:
    scheduler = Scheduler(ONE)
    for i in range(50):
        scheduler.add(make_sequence(f"many{i}", [i] * 10, 1, adapter_key="many"))
    scheduler.add(make_sequence("few", [1] * 10, 1, adapter_key="few"))
    assert order_of_admission(scheduler).index("few") <= 1


def test_idleness_earns_no_credit() -> None:
    scheduler = Scheduler(ONE)
    for i in range(20):
        scheduler.add(make_sequence(f"a{i}", [i] * 10, 1, tenant="a"))
    for _ in range(10):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.advance(plan.chunks[0], sound=True)
        scheduler.remove(plan.chunks[0].sequence)
    # "b" was away for ten requests of "a": from now on they alternate.
    for i in range(10):
        scheduler.add(make_sequence(f"b{i}", [100 + i] * 10, 1, tenant="b"))
    order = order_of_admission(scheduler)
    assert [name[0] for name in order[:18]].count("b") in (9, 10)
    assert all(len({name[0] for name in order[i : i + 3]}) == 2 for i in range(16))


def test_weights() -> None:
    scheduler = Scheduler(EngineConfig(1, 16, 16, 4, 16, tenant_weights={"a": 3.0}))
    for i in range(60):
        for tenant in "ab":
            scheduler.add(make_sequence(f"{tenant}{i}", [i] * 10, 1, tenant=tenant))
    assert [name[0] for name in order_of_admission(scheduler)[:40]].count("a") == 30


def test_priorities_are_strict() -> None:
    scheduler = Scheduler(ONE)
    for i, priority in enumerate([0, -2, 5, 0, 5, 10, -2]):
        scheduler.add(make_sequence(f"{priority}/{i}", [i] * 4, 1, priority=priority, tenant=str(i)))
    assert order_of_admission(scheduler) == ["10/5", "5/2", "5/4", "0/0", "0/3", "-2/1", "-2/6"]


def test_preemption_takes_the_lowest_priority_first() -> None:
    """Three of three pages each grow at once and one page is left: the unimportant one goes, though it came first."""
    scheduler = Scheduler(EngineConfig(3, 64, 32, 4, 9))
    names = {"low": -1, "high": 3, "mid": 0}
    sequences = {
        n: make_sequence(n, range(12 * i, 12 * i + 12), 8, priority=p) for i, (n, p) in enumerate(names.items())
    }
    for name in names:
        scheduler.add(sequences[name])
        plan = scheduler.schedule()
        assert plan is not None
        for chunk in plan.chunks:
            scheduler.advance(chunk, sound=True)
            if name == "mid":
                break
    for sequence in scheduler.running:
        sequence.output_ids.append(1)
        sequence.computed = 12
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.preempted == 1
    assert [s.request.request_id for s in scheduler.running] == ["high", "mid"]


def step(scheduler: Scheduler) -> list[str]:
    """One step in which nobody ends; who decodes says token 7. Names of all that run."""
    plan = scheduler.schedule()
    assert plan is not None
    for chunk in plan.chunks:
        completes = chunk.completes
        scheduler.advance(chunk, sound=True)
        if completes:
            chunk.sequence.output_ids.append(7)
    assert {chunk.sequence for chunk in plan.chunks} == set(scheduler.running)
    return [sequence.request.request_id for sequence in scheduler.running]


def test_a_higher_priority_takes_the_place_of_the_lowest() -> None:
    """All places are taken: the lowest priority that was admitted last gives way, and among equals nobody does."""
    scheduler = Scheduler(EngineConfig(3, 64, 64, 4, 64))
    for i, (name, priority) in enumerate({"mid": 0, "low": -1, "last": -1}.items()):
        scheduler.add(make_sequence(name, [i] * 9, 20, priority=priority))
    assert step(scheduler) == ["mid", "low", "last"]
    scheduler.add(make_sequence("late", [5] * 9, 20, priority=-1))
    assert step(scheduler) == ["mid", "low", "last"]
    scheduler.add(make_sequence("high", [6] * 9, 20, priority=2))
    assert step(scheduler) == ["high", "mid", "low"]
    for name, priority in (("second", 2), ("equal", 0), ("third", 1)):
        scheduler.add(make_sequence(name, [10 + priority] * 9, 20, priority=priority))
        assert step(scheduler) == ["high", "second", "third" if name == "third" else "mid"]
    # Who was preempted comes back in the order of admission, before those that never ran.
    for name in ("high", "second", "third"):
        scheduler.remove(next(s for s in scheduler.running if s.request.request_id == name))
    assert step(scheduler) == ["mid", "equal", "low"]


def test_pages_are_taken_from_lower_priorities_only_where_that_helps() -> None:
    """Ten pages. Four that are needed can be had by putting off one of two small ones, but not beside the important one."""
    scheduler = Scheduler(EngineConfig(8, 64, 40, 4, 10, prefix_cache=False))
    for name, priority, length in (("important", 5, 14), ("low1", 0, 10), ("low2", 0, 10)):
        scheduler.add(make_sequence(name, [1] * length, 2, priority=priority))
    assert step(scheduler) == ["important", "low1", "low2"]
    scheduler.add(make_sequence("large", [2] * 26, 2, priority=3))
    assert step(scheduler) == ["important", "low1", "low2"]
    scheduler.remove(next(s for s in scheduler if s.request.request_id == "large"))
    scheduler.add(make_sequence("medium", [2] * 11, 2, priority=3))
    assert step(scheduler) == ["important", "medium", "low1"]


def test_state_does_not_grow_with_adapters_ever_seen() -> None:
    scheduler = Scheduler(EngineConfig(2, 16, 16, 4, 16))
    for i in range(500):
        scheduler.add(make_sequence(f"r{i}", [1, 2], 1, adapter_key=f"adapter{i}", tenant=f"t{i % 7}", priority=i % 3))
        assert scheduler.flows == 1
        order_of_admission(scheduler)
        assert scheduler.flows == 0
    assert not scheduler._queues


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    scheduler = Scheduler(EngineConfig(8, 64, 4096, 16, 1024))
    for i in range(3):
        scheduler.add(make_sequence(f"long{i}", [i] * 4000, 8))
    waited: list[int] = []
    for arrival in range(20):
        scheduler.add(make_sequence("short", [100 + arrival] * 20, 1))
        for steps in range(1, 100):
            plan = scheduler.schedule()
            assert plan is not None
            done = [chunk.sequence for chunk in plan.chunks if chunk.completes]
            for chunk in plan.chunks:
                scheduler.advance(chunk, sound=True)
            if done:
                assert [s.request.request_id for s in done] == ["short"]
                scheduler.remove(done[0])
                waited.append(steps)
                break
    assert waited == [1] * 20
    # Nor do short ones hold up the long one: the first gets half of every step.
    first = next(s for s in scheduler.running if s.request.request_id == "long0")
    assert first.computed >= 20 * 32


def test_a_failed_step_leaves_no_fresh_pages_behind() -> None:
    """The engine removes the sequences of a failed step; the pages come back fresh for their next owners."""
    scheduler = Scheduler(EngineConfig(4, 16, 8, page_tokens=2, cache_pages=4))
    first, second = make_sequence("a", range(8)), make_sequence("b", range(6))
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.fresh_pages) == 4
    scheduler.remove(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    assert sorted(plan.fresh_pages) == sorted(second.pages)
    assert len(second.pages) == 3
