"""Prometheus metrics. No label grows with the number of adapters: the most used have series, the others one together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overtone.adapters.store import StoreStats
from overtone.api.adapter_metrics import AdapterSeries
from overtone.api.statistics import AdapterStatistics
from overtone.api.store_metrics import StoreTiers
from overtone.engine.types import StepStats

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_LOAD_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All metrics of one server, in a registry of its own so that several servers fit into one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"overtone_{name}", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"overtone_{name}", text, registry=registry)

        self._calls = Counter("overtone_calls", "RPCs ended", ["method", "code"], registry=registry)
        self._requests = Counter(
            "overtone_requests", "Generations ended, by outcome and by whether an adapter served", ["outcome", "adapted"],
            registry=registry,
        )  # fmt: skip
        self._prompt_tokens = Counter("overtone_prompt_tokens", "Prompt tokens accepted", registry=registry)
        self._generated_tokens = Counter("overtone_generated_tokens", "Tokens generated", registry=registry)
        self._preemptions = Counter("overtone_preemptions", "Requests that gave up their pages", registry=registry)
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token")
        self._inter_token = histogram("inter_token_seconds", "Between two tokens of a request")
        self._queue = histogram("queue_seconds", "Arrival to the first step that worked on the request")
        self._total = histogram("request_seconds", "Arrival to last token")
        self._step = histogram("step_seconds", "One forward pass with scheduling and sampling")
        self._distinct = histogram("batch_distinct_adapters", "Distinct adapters in one step", _BATCH)
        self._batch = histogram("batch_requests", "Requests in one step", _BATCH)
        self._load = histogram("adapter_load_seconds", "Making an adapter resident from disk", _LOAD_SECONDS)
        self._running = gauge("requests_running", "Requests in the batch")
        self._waiting = gauge("requests_waiting", "Requests in the queue")
        self._kv_used = gauge("kv_cache_usage_ratio", "Pages of the KV cache in use, 0 to 1")
        self._kv_cached = gauge("prefix_cache_pages", "Pages of the KV cache that may be found by their contents")
        self._prefix_queries = Counter(
            "overtone_prefix_cache_query_tokens", "Tokens looked up in the prefix cache", registry=registry
        )
        self._prefix_hits = Counter(
            "overtone_prefix_cache_hit_tokens", "Tokens found in the prefix cache", registry=registry
        )
        self._prefix_evictions = Counter(
            "overtone_prefix_cache_evictions", "Pages that the prefix cache gave up", registry=registry
        )

    def watch_adapter_rows(self, rows: Callable[[], Mapping[str, int]]) -> None:
        """rows: how often adapters were applied to a token's row of a layer, by path."""
        self.registry.register(_AdapterRows(rows))

    def watch_device_pool(self, stats: Callable[[], PoolCounts]) -> None:
        """Of a server whose adapters are applied from the memory of a GPU."""
        self.registry.register(_DevicePool(stats))

    def count_call(self, method: str, code: str) -> None:
        self._calls.labels(method, code).inc()

    def count_prompt(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def count_tokens(self, tokens: int) -> None:
        self._generated_tokens.inc(tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def observe_finish(self, queue_s: float, total_s: float) -> None:
        self._queue.observe(queue_s)
        self._total.observe(total_s)

    def count_request(self, outcome: str, *, adapted: bool) -> None:
        self._requests.labels(outcome, str(adapted).lower()).inc()

    def observe_load(self, seconds: float) -> None:
        self._load.observe(seconds)

    def watch_store(self, stats: Callable[[], StoreStats]) -> None:
        self.registry.register(StoreTiers(stats))

    def watch_adapters(self, statistics: AdapterStatistics, *, labelled: bool) -> None:
        """labelled: whether the most used adapters have series of their own."""
        self.registry.register(AdapterSeries(statistics, labelled=labelled))

    def observe_step(self, stats: StepStats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_used.set(stats.pages_used / max(1, stats.pages_total))
        self._preemptions.inc(stats.preemptions)
        self._kv_cached.set(stats.pages_cached)
        self._prefix_queries.inc(stats.prefix_query_tokens)
        self._prefix_hits.inc(stats.prefix_hit_tokens)
        self._prefix_evictions.inc(stats.prefix_evictions)
        if stats.prefill_tokens or stats.decode_tokens:
            self._step.observe(stats.duration_s)
            self._distinct.observe(stats.distinct_adapters)
            self._batch.observe(stats.chunks)


class PoolCounts(Protocol):
    """What a pool of adapters in a GPU's memory counts."""

    @property
    def extents(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def uploads(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def moves(self) -> int: ...


class _AdapterRows(Collector):
    """Counted in the engine's thread, read when somebody scrapes."""

    def __init__(self, rows: Callable[[], Mapping[str, int]]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "overtone_adapter_rows",
            "Rows of adapted layers, by how the batch's adapters were applied to them",
            labels=["path"],
        )
        for path, count in sorted(self._rows().items()):
            family.add_metric([path], count)
        yield family


class _DevicePool(Collector):
    """Counted in the engine's thread, read when somebody scrapes."""

    def __init__(self, stats: Callable[[], PoolCounts]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        name = "overtone_device_adapter"
        yield GaugeMetricFamily(f"{name}s", "Adapters in the GPU's memory", now.extents)
        yield GaugeMetricFamily(f"{name}_bytes", "What they take of the GPU's memory", now.nbytes)
        yield CounterMetricFamily(f"{name}_uploads", "Adapters copied to the GPU", value=now.uploads)
        yield CounterMetricFamily(f"{name}_evictions", "Adapters that made room for others there", value=now.evictions)
        yield CounterMetricFamily(f"{name}_moves", "Adapters that were moved there to join holes", value=now.moves)
