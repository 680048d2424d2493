"""What happened to the adapters in memory since the start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from overtone.adapters.records import StoreStats
from overtone.adapters.residency.contents import Contents
from overtone.adapters.resident import Source


@dataclass(slots=True)
class Counts:
    """loads: by where they came from; misses: uses that waited for a load; failures: loads that failed."""

    hits: int = 0
    misses: int = 0
    failures: int = 0
    loads: Counter[Source] = field(default_factory=Counter)

    def stats(self, registered_count: int, contents: Contents) -> StoreStats:
        return StoreStats(
            registered_count=registered_count,
            resident_count=contents.resident,
            resident_bytes=contents.used,
            memory_bytes=contents.budget,
            leased_count=contents.leased,
            load_count=self.loads.total(),
            load_failure_count=self.failures,
            hit_count=self.hits,
            eviction_count=contents.evictions,
            miss_count=self.misses,
            disk_load_count=self.loads["disk"],
            remote_load_count=self.loads["remote"],
            memory_load_count=self.loads["memory"],
        )
