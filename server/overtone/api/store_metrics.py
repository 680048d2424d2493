"""Prometheus metrics of the store's tiers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overtone.adapters.store import StoreStats
from overtone.errors import OvertoneError

_log = logging.getLogger(__name__)

_GAUGES: Mapping[str, tuple[str, Callable[[StoreStats], int]]] = {
    "adapters_registered": ("Adapters in the catalogue", lambda s: s.registered_count),
    "adapters_quarantined": ("Versions whose stored content was found damaged", lambda s: s.quarantined_count),
    "adapters_resident": ("Adapters in memory", lambda s: s.resident_count),
    "adapters_resident_bytes": ("Memory of resident adapters", lambda s: s.resident_bytes),
    "adapters_leased": ("Adapters in memory that requests use", lambda s: s.leased_count),
    "store_live_bytes": ("Bytes on disk that adapters refer to", lambda s: s.live_bytes),
    "store_packs": ("Packs of adapters", lambda s: s.pack_count),
    "adapter_memo_bytes": ("Memory of what loads share and nothing in memory uses", lambda s: s.memo_bytes),
    "store_pending_packs": ("Full packs that are not in object storage yet", lambda s: s.pending_pack_count),
    "adapter_negative_cache_entries": ("Ids remembered as unknown", lambda s: s.negative_count),
}
_COUNTERS: Mapping[str, tuple[str, Callable[[StoreStats], int]]] = {
    "adapter_cache_hits": ("Uses of adapters that were in memory", lambda s: s.hit_count),
    "adapter_cache_misses": ("Uses of adapters that were not in memory", lambda s: s.miss_count),
    "adapter_cache_evictions": ("Adapters that made room for others in memory", lambda s: s.eviction_count),
    "adapter_load_failures": ("Loads that failed", lambda s: s.load_failure_count),
    "store_remote_failed_passes": ("Passes of uploads and evictions that failed", lambda s: s.failed_pass_count),
    "store_remote_fetch_failures": (
        "Reads that object storage did not answer rightly",
        lambda s: s.fetch_failure_count,
    ),
    "adapter_negative_cache_hits": ("Uses of ids remembered as unknown", lambda s: s.negative_hit_count),
}
_TIERS: Mapping[str, Callable[[StoreStats], int]] = {
    "memory": lambda s: s.resident_bytes,
    "disk": lambda s: s.disk_bytes,
    "remote": lambda s: s.remote_bytes,
}
_BUDGETS: Mapping[str, Callable[[StoreStats], int]] = {
    "memory": lambda s: s.memory_bytes,
    "disk": lambda s: s.disk_budget_bytes,
}
_SOURCES: Mapping[str, Callable[[StoreStats], int]] = {
    "disk": lambda s: s.disk_load_count,
    "remote": lambda s: s.remote_load_count,
    "memory": lambda s: s.memory_load_count,
}


class StoreTiers(Collector):
    """Read when somebody scrapes, in the scraper's thread: never on a request's way."""

    def __init__(self, stats: Callable[[], StoreStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        try:
            now = self._stats()
        except OvertoneError as error:  # a disk that fails must not hide all other metrics
            _log.warning("no metrics of the store: %s", error)
            return
        for name, (text, value) in _GAUGES.items():
            yield GaugeMetricFamily(f"overtone_{name}", text, value(now))
        for name, (text, value) in _COUNTERS.items():
            yield CounterMetricFamily(f"overtone_{name}", text, value=value(now))
        yield _by_tier("overtone_store_bytes", "Bytes of adapters, by where they are", _TIERS, now)
        yield _by_tier("overtone_store_budget_bytes", "What they may take there; 0: no limit", _BUDGETS, now)
        loads = CounterMetricFamily("overtone_adapter_loads", "Loads into memory, by their source", labels=["source"])
        for source, value in _SOURCES.items():
            loads.add_metric([source], value(now))
        yield loads


def _by_tier(
    name: str, text: str, tiers: Mapping[str, Callable[[StoreStats], int]], now: StoreStats
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["tier"])
    for tier, value in tiers.items():
        family.add_metric([tier], value(now))
    return family
