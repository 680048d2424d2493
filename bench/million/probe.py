"""What a full catalogue costs: in a process of its own, opens a store, looks up ids and says how long and how large.

Usage: python -m bench.million.probe STORE BASE_FACTS COUNT LOOKUPS > result.json
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from bench.million.fill import adapter_id, base_of, open_store
from bench.peers.stats import percentile


def rss_bytes(process: int | str = "self") -> int:
    """Of a process, without pages of files that others share."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        if ":" in line
    )
    return 1024 * (int(fields["VmRSS"].split()[0]) - int(fields["RssFile"].split()[0]))


def main() -> None:
    root, facts, count, lookups = sys.argv[1:]
    base = base_of(Path(facts))
    before = rss_bytes()
    started = time.perf_counter()
    store = open_store(Path(root), base)
    opened = time.perf_counter() - started
    draw = random.Random(1)
    taken = []
    for _ in range(int(lookups)):
        wanted = adapter_id(draw.randrange(int(count)))
        started = time.perf_counter()
        store.get(wanted)
        taken.append(1e3 * (time.perf_counter() - started))
    acquired = []
    for _ in range(int(lookups) // 10):
        wanted = adapter_id(draw.randrange(int(count)))
        started = time.perf_counter()
        store.acquire(wanted).release()
        acquired.append(1e3 * (time.perf_counter() - started))
    stats = store.stats()
    result = {
        "registered": stats.registered_count,
        "open_s": round(opened, 4),
        "rss_mib": round((rss_bytes() - before - stats.resident_bytes) / 2**20, 1),
        "lookup_p50_ms": round(percentile(taken, 50), 4),
        "lookup_p99_ms": round(percentile(taken, 99), 4),
        "acquire_p50_ms": round(percentile(acquired, 50), 3),
        "acquire_p99_ms": round(percentile(acquired, 99), 3),
    }
    store.close()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
