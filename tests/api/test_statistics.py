"""Statistics of adapters against a model that keeps everything, and that their table stays bounded."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.api import latency
from overtone.api.latency import RELATIVE_ERROR, Latency
from overtone.api.leaders import Leaders
from overtone.api.statistics import AdapterStatistics, Use
from overtone.api.usage import ORDERS, OUTCOMES, Measured, Usage

SECONDS = st.floats(1e-4, 6e4)


def exact(seconds: list[float], percent: int) -> float:
    return sorted(seconds)[math.ceil(len(seconds) * percent / 100) - 1]


@given(st.lists(SECONDS, min_size=1, max_size=300))
def test_quantiles_are_within_the_stated_error(seconds: list[float]) -> None:
    for kind in Latency:
        counts = latency.unpack(latency.pack(Counter(latency.key_of(kind, each) for each in seconds)))
        found = latency.quantiles(counts, kind)
        assert found.count == len(seconds)
        for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
            assert value == pytest.approx(exact(seconds, percent), rel=RELATIVE_ERROR + 1e-9)
        others = [latency.quantiles(counts, other) for other in Latency if other is not kind]
        assert others == [latency.Quantiles(0, 0.0, 0.0, 0.0)] * 2


def test_what_no_bucket_is_made_for() -> None:
    counts = Counter(latency.key_of(Latency.TOTAL, seconds) for seconds in (-1.0, 0.0, 1e-9, 1e9))
    assert latency.quantiles(counts, Latency.TOTAL).count == 4
    assert latency.quantiles({}, Latency.TOTAL) == latency.Quantiles(0, 0.0, 0.0, 0.0)
    assert latency.quantiles(counts, Latency.TOTAL).p99 < 1e6


@dataclass
class Kept:
    """All that was ever counted of one adapter since it was last forgotten."""

    outcomes: Counter[str] = field(default_factory=Counter)
    prompt: int = 0
    generated: int = 0
    seconds: dict[Latency, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, outcome: str, prompt: int, times: list[float]) -> None:
        self.outcomes[outcome] += 1
        self.prompt += prompt
        self.generated += len(times)
        for i, seconds in enumerate(times):
            self.seconds[Latency.INTER_TOKEN if i else Latency.FIRST_TOKEN].append(seconds)
        if outcome in ("length", "eos", "stop"):
            self.seconds[Latency.TOTAL].append(sum(times))

    def check(self, usage: Usage) -> None:
        assert {name: count for name, count in usage.outcomes.items() if count} == self.outcomes
        assert usage.outcomes.keys() == set(OUTCOMES)
        assert usage.requests == self.outcomes.total()
        assert usage.errors == self.outcomes["error"] + self.outcomes["deadline_exceeded"]
        assert (usage.prompt_tokens, usage.generated_tokens) == (self.prompt, self.generated)
        for kind, found in zip(Latency, (usage.first_token, usage.inter_token, usage.total), strict=True):
            assert found.count == len(self.seconds[kind])
            if found.count:
                assert found.p90 == pytest.approx(exact(self.seconds[kind], 90), rel=RELATIVE_ERROR + 1e-9, abs=1e-4)


def measured(prompt: int, times: list[float], outcome: str) -> Measured:
    made, now = Measured(100.0, prompt), 100.0
    for seconds in times:
        now += seconds
        assert made.tokens(1, now) == pytest.approx(seconds)
    if outcome in ("length", "eos", "stop"):
        made.ended(sum(times))
    return made


IDS = st.sampled_from("abcdefgh")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), IDS),
        st.tuples(
            st.just("end"),
            st.integers(0, 5),
            st.sampled_from(OUTCOMES),
            st.integers(0, 9),
            st.lists(st.floats(0.001, 10), max_size=4),
        ),
        st.tuples(st.just("forget"), IDS),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(2, 9))
def test_against_a_model(steps: list[tuple], limit: int) -> None:
    """Whatever is used, deleted and folded while requests run: every request counts once, where the model has it."""
    ticks = iter(range(1, 1000))
    statistics = AdapterStatistics(limit, min(2, limit - 1), clock=lambda: float(next(ticks)))
    kept: dict[str, Kept] = {}
    other, running = Kept(), list[tuple[Use, Kept]]()
    for step in steps:
        if step[0] == "begin":
            use = statistics.begin(step[1])
            known = {each.adapter_id for each in statistics.top("request_count", 100)}
            assert len(known) == statistics.tracked <= limit
            for gone in kept.keys() - known:
                merge(other, kept.pop(gone))
            running.append((use, kept.setdefault(step[1], Kept())))
        elif step[0] == "forget":
            statistics.forget(step[1])
            if step[1] in kept:
                merge(other, kept.pop(step[1]))
        elif running:
            use, into = running.pop(step[1] % len(running))
            statistics.end(use, measured(step[3], step[4], step[2]), step[2])
            (into if any(into is each for each in kept.values()) else other).add(step[2], step[3], step[4])
    for adapter_id in "abcdefgh":
        usage = statistics.get(adapter_id)
        assert (usage is None) == (adapter_id not in kept)
        if usage is not None:
            kept[adapter_id].check(usage)
    other.check(statistics.other())
    everything = statistics.leaders()[1]
    assert everything.requests == sum(each.outcomes.total() for each in (*kept.values(), other))
    assert everything.generated_tokens == sum(each.generated for each in (*kept.values(), other))


def merge(into: Kept, more: Kept) -> None:
    into.outcomes += more.outcomes
    into.prompt += more.prompt
    into.generated += more.generated
    for kind, seconds in more.seconds.items():
        into.seconds[kind] += seconds


def count(statistics: AdapterStatistics, adapter_id: str, times: int = 1, outcome: str = "eos") -> None:
    for _ in range(times):
        statistics.end(statistics.begin(adapter_id), measured(2, [0.1, 0.01], outcome), outcome)


def test_orders_and_pages() -> None:
    statistics = AdapterStatistics(100)
    for i in range(5):
        count(statistics, f"a{i}", times=i + 1, outcome="error" if i < 2 else "eos")
    slow = statistics.begin("slow")
    statistics.end(slow, measured(50, [5.0], "length"), "length")
    names = [each.adapter_id for each in statistics.top("request_count", 10)]
    assert names == ["a4", "a3", "a2", "a1", "a0", "slow"]
    assert [each.adapter_id for each in statistics.top("request_count", 2, 1)] == ["a3", "a2"]
    assert [each.adapter_id for each in statistics.top("request_count", 2, descending=False)] == ["a0", "slow"]
    assert [each.adapter_id for each in statistics.top("error_count", 2)] == ["a1", "a0"]
    for order in ("prompt_token_count", "time_to_first_token.p99", "total.p99", "last_use_time"):
        assert statistics.top(order, 1)[0].adapter_id == "slow"
    assert statistics.top("inter_token.p99", 10)[-1].adapter_id == "slow"
    assert {"request_count", "generated_token_count"} < ORDERS.keys()
    assert statistics.top("request_count", 10, 99) == []


def test_times_of_use() -> None:
    now = [10.0]
    statistics = AdapterStatistics(2, clock=lambda: now[0])
    use = statistics.begin("a")
    now[0] = 20.0
    statistics.end(use, Measured(0.0, 1), "cancelled")
    now[0] = 30.0
    statistics.failed("a")
    usage = statistics.get("a")
    assert usage is not None
    assert usage.first_use is not None
    assert usage.last_use is not None
    assert (usage.first_use.timestamp(), usage.last_use.timestamp()) == (10.0, 30.0)
    assert (usage.outcomes["cancelled"], usage.outcomes["error"], usage.total.count) == (1, 1, 0)
    assert statistics.other().first_use is None


def test_the_least_recently_used_is_folded_but_no_leader() -> None:
    statistics = AdapterStatistics(3, leaders=1)
    count(statistics, "hot", times=9)
    for name in "abcd":
        count(statistics, name)
    assert statistics.get("hot") is not None
    assert [statistics.get(name) is not None for name in "abcd"] == [False, False, True, True]
    assert (statistics.tracked, statistics.folded, statistics.other().requests) == (3, 2, 2)


@given(st.lists(st.tuples(IDS, st.booleans()), max_size=200), st.integers(0, 4))
def test_leaders_have_the_most(uses: list[tuple[str, bool]], size: int) -> None:
    statistics = AdapterStatistics(50, leaders=size)
    requests = Counter[str]()
    for adapter_id, deleted in uses:
        count(statistics, adapter_id)
        requests[adapter_id] += 1
        if deleted and requests.total() % 7 == 0:
            statistics.forget(adapter_id)
            del requests[adapter_id]
    leaders, everything = statistics.leaders()
    assert everything.requests == len(uses)
    assert {name: each.requests for name, each in leaders.items()} == {name: requests[name] for name in leaders}
    assert len(leaders) == min(size, len(requests))
    least = min((each.requests for each in leaders.values()), default=math.inf)
    assert all(requests[name] <= least for name in requests.keys() - leaders.keys())


def test_a_leader_gives_way_only_to_more() -> None:
    leaders = Leaders(2)
    for adapter_id, requests in (("a", 3), ("b", 5), ("c", 3), ("d", 1)):
        leaders.saw(adapter_id, requests)
    assert leaders.ids == ["b", "a"]
    leaders.saw("c", 4)
    assert leaders.ids == ["b", "c"]


def test_many_adapters_take_little() -> None:
    statistics = AdapterStatistics(1000, leaders=10)
    numbers = random.Random(0)
    for i in range(20_000):
        count(statistics, f"adapter-{i if i % 3 else numbers.randrange(20)}")
    assert statistics.tracked == 1000
    assert statistics.folded > 10_000
    tracked = sum(each.requests for each in statistics.top("request_count", 1000))
    assert tracked + statistics.other().requests == 20_000
    largest = max(len(packed) for packed in statistics._tallies.values())
    assert largest < 400
