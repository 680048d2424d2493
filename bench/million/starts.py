"""What a full catalogue costs a server at its start: beside one whose store is empty, in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.million.probe import rss_bytes

from overtone.api.cli.process import ServerProcess

EMPTY, FULL = "empty", "full"


def server_arguments(root: Path, cache: Path, model: str) -> list[str]:
    return ["--model", model, "--store", str(root), "--model-cache", str(cache), "--dtype", "float32"]


def measure_starts(root: Path, cache: Path, model: str, rounds: int) -> Iterator[dict[str, object]]:
    """A row for every round and store: seconds until it serves, and its memory then."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {EMPTY: Path(folder), FULL: root}
        for number in range(rounds):
            for name in (EMPTY, FULL) if number % 2 == 0 else (FULL, EMPTY):
                started = time.perf_counter()
                with ServerProcess(server_arguments(roots[name], cache, model)) as server:
                    taken = time.perf_counter() - started
                    rss = rss_bytes(server.process.pid) / 2**20
                    with server.client() as client:
                        registered = client.store.statistics().adapter_count
                yield {
                    "store": name,
                    "round": number,
                    "registered": registered,
                    "start_s": round(taken, 3),
                    "rss_mib": round(rss, 1),
                }


def summary_of_starts(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Medians, and what the full one has more."""
    found: list[dict[str, object]] = []
    for name in (EMPTY, FULL):
        own = [row for row in rows if row["store"] == name]
        medians = {key: statistics.median(float(str(row[key])) for row in own) for key in ("start_s", "rss_mib")}
        found.append({"store": name, "registered": own[0]["registered"], **medians})
    more = {key: round(float(str(found[1][key])) - float(str(found[0][key])), 3) for key in ("start_s", "rss_mib")}
    return [*found, {"store": "more", "registered": "", **more}]
