"""Series by adapter: few, exact, and each of them only rises."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from overtone.adapters.store import StoreStats
from overtone.api.adapter_metrics import OTHER, AdapterSeries
from overtone.api.metrics import Metrics
from overtone.api.statistics import AdapterStatistics
from overtone.api.store_metrics import StoreTiers
from overtone.api.usage import Measured
from overtone.errors import StoreFailed

NAMES = ("requests", "generated_tokens", "errors")


def count(statistics: AdapterStatistics, adapter_id: str, tokens: int = 3, outcome: str = "eos") -> None:
    statistics.end(statistics.begin(adapter_id), Measured(0.0, 1, tokens), outcome)


def scrape(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """(name, adapter or "") -> value, of a real scrape."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, s.labels.get("adapter", "")): s.value for s in samples}


def watched(limit: int, leaders: int) -> tuple[AdapterStatistics, CollectorRegistry]:
    statistics, registry = AdapterStatistics(limit, leaders), CollectorRegistry()
    registry.register(AdapterSeries(statistics, labelled=leaders > 0))
    return statistics, registry


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abcdef"), st.integers(0, 5), st.sampled_from(["eos", "error"])),
            st.just("scrape"),
        ),
        max_size=120,
    ),
    st.integers(1, 4),
)
def test_each_request_is_in_the_increase_of_one_series(steps: list[Any], top: int) -> None:
    statistics, registry = watched(10, top)
    totals: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    # Of every series its last value, as Prometheus keeps it also while there is none.
    last, increases, first = scrape(registry), Counter[str](), True
    for step in [*steps, "scrape"]:
        if step != "scrape":
            count(statistics, *step)
            for name, number in zip(NAMES, (1, step[1], int(step[2] == "error")), strict=True):
                totals[name][step[0]] += number
            continue
        now = scrape(registry)
        for name in NAMES:
            series = {
                label: value for (metric, label), value in now.items() if metric == f"overtone_adapter_{name}_total"
            }
            assert OTHER in series
            assert len(series) <= top + 1
            for label, value in series.items():
                key = (f"overtone_adapter_{name}_total", label)
                before = last.get(key, 0)
                assert value >= before or (label != OTHER and value == 0)  # it has come back
                increases[name] += int(value - before if value >= before else value)
                assert label == OTHER or value <= totals[name][label]
        last, first = {**last, **now}, False
    assert not first
    assert {name: increases[name] for name in NAMES} == {name: totals[name].total() for name in NAMES}


def test_an_adapter_that_comes_back_again_and_again_is_counted_once() -> None:
    statistics, registry = watched(10, 1)
    last, increases, made = scrape(registry), Counter[str](), Counter[str]()
    for turn in range(1, 9):
        name = "ab"[turn % 2]
        for times in (20 * turn, 1, 2):  # it enters the top, is counted there
            for _ in range(times):
                count(statistics, name)
                made[name] += 1
            now = scrape(registry)
            for key, value in now.items():
                if key[0] == "overtone_adapter_requests_total":
                    before = last.get(key, 0)
                    increases[key[1]] += int(value - before if value >= before else value)
            last |= now
    assert increases.total() == made.total()
    assert (increases["a"], increases["b"]) == (4 * 3, 4 * 3)


def test_ten_thousand_adapters_make_few_series() -> None:
    statistics, registry = watched(5000, 50)
    numbers, requests, labels = random.Random(1), Counter[str](), set()
    for i in range(30_000):
        name = f"adapter-{min(int(numbers.paretovariate(0.4)), 9_999)}"
        count(statistics, name)
        requests[name] += 1
        if i % 3000 == 0:
            labels |= {label for _, label in scrape(registry) if label}
    now = scrape(registry)
    assert len(requests) > 1000
    assert len([key for key in now if key[1]]) == 3 * 51
    assert statistics.tracked == now["overtone_adapters_tracked", ""]
    largest = {name for name, _ in requests.most_common(20)}
    assert all(0 < now["overtone_adapter_requests_total", name] <= requests[name] for name in largest)
    assert labels <= requests.keys() | {OTHER}
    assert now["overtone_adapter_label_overflow_total", ""] == now["overtone_adapter_requests_total", OTHER]


def test_the_series_of_a_deleted_adapter_is_gone_and_nothing_falls() -> None:
    statistics, registry = watched(10, 2)
    for name, times in (("a", 5), ("b", 3), ("c", 2)):
        for _ in range(times):
            count(statistics, name)
    before = scrape(registry)
    assert before["overtone_adapter_requests_total", OTHER] == 10  # nothing was shown as an increase yet
    count(statistics, "a")
    statistics.forget("a")
    after = scrape(registry)
    assert ("overtone_adapter_requests_total", "a") not in after
    assert after["overtone_adapter_requests_total", "c"] == 0  # the next in line
    assert after["overtone_adapter_requests_total", OTHER] == 11
    count(statistics, "a")
    count(statistics, "b")
    again = scrape(registry)
    assert again["overtone_adapter_requests_total", "b"] == 1
    assert again["overtone_adapter_requests_total", OTHER] == 12


def test_no_names_if_none_are_wanted() -> None:
    statistics, registry = watched(10, 0)
    count(statistics, "secret")
    text = generate_latest(registry).decode()
    assert "secret" not in text
    assert "adapter=" not in text
    assert "overtone_adapters_tracked 1.0" in text


def test_tiers() -> None:
    stats = StoreStats(
        registered_count=9, resident_count=3, resident_bytes=30, memory_bytes=100, leased_count=1, load_count=8,
        load_failure_count=1, hit_count=20, eviction_count=2, miss_count=9, disk_load_count=4,
        remote_load_count=3, memory_load_count=1, negative_count=4,
        negative_hit_count=5, quarantined_count=1, live_bytes=70, disk_bytes=90, disk_budget_bytes=200, pack_count=2,
        remote_bytes=95, memo_bytes=11, pending_pack_count=12, failed_pass_count=13, fetch_failure_count=14,
    )  # fmt: skip
    registry = CollectorRegistry()
    registry.register(StoreTiers(lambda: stats))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert found["overtone_adapters_registered",] == 9
    assert found["overtone_adapter_cache_hits_total",] == 20
    assert found["overtone_adapter_cache_misses_total",] == 9
    assert [found["overtone_adapter_loads_total", source] for source in ("disk", "remote", "memory")] == [4, 3, 1]
    assert [found["overtone_store_bytes", tier] for tier in ("memory", "disk", "remote")] == [30, 90, 95]
    assert [found["overtone_store_budget_bytes", tier] for tier in ("memory", "disk")] == [100, 200]
    assert found["overtone_adapter_negative_cache_hits_total",] == 5
    assert (found["overtone_adapter_memo_bytes",], found["overtone_store_pending_packs",]) == (11, 12)
    assert found["overtone_store_remote_failed_passes_total",] == 13
    assert found["overtone_store_remote_fetch_failures_total",] == 14


def test_a_store_that_cannot_be_asked_hides_no_other_metrics(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> StoreStats:
        raise StoreFailed("the disk is gone")

    metrics = Metrics()
    metrics.watch_store(fails)
    text = generate_latest(metrics.registry).decode()
    assert "overtone_requests_running" in text
    assert "overtone_adapters_registered" not in text
    assert all(name in text for name in ("process_resident_memory_bytes", "python_info", "python_gc_collections_total"))
    assert "the disk is gone" in caplog.text


def test_folded_adapters_are_visible() -> None:
    statistics, registry = watched(3, 1)
    for name in "abcde":
        count(statistics, name)
    assert scrape(registry)["overtone_adapters_folded_total", ""] == 2
    with pytest.raises(KeyError):
        scrape(registry)["overtone_adapter_requests_total", "e"]
