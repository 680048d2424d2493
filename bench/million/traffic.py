"""Requests over a full catalogue against the same requests over one adapter, through a server in a process of its own.

Every round runs all arms, in turn forwards and backwards. A popularity's first pass finds its adapters on the disk, their
pages dropped from the system's cache; the second pass repeats its requests and finds them in the host's memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from bench.million.fill import adapter_id
from bench.million.starts import server_arguments
from bench.peers.workload import Job

from overtone.api.cli.process import ServerProcess

ONE, ZIPF, UNIFORM = "one adapter", "Zipf(1.0)", "uniform"
ARMS = (ONE, f"{ZIPF} from disk", f"{ZIPF} in memory", f"{UNIFORM} from disk", f"{UNIFORM} in memory")
_NUMBERS = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms")


@dataclasses.dataclass(frozen=True)
class Load:
    """Closed loop."""

    requests: int = 128
    concurrency: int = 16
    new_tokens: int = 16


def popularity(name: str, count: int) -> Callable[[random.Random], int]:
    """Draws the number of an adapter of `count`; under Zipf(1.0) the k-th most popular is asked for 1 / k as often."""
    if name == UNIFORM:
        return lambda draw: draw.randrange(count)
    totals = list(accumulate(1 / k for k in range(1, count + 1)))
    # Which adapter is how popular has nothing to do with when it was imported.
    return lambda draw: bisect(totals, draw.random() * totals[-1]) * 7919 % count


def measure(root: Path, cache: Path, model: str, count: int, rounds: int, load: Load) -> Iterator[dict[str, object]]:
    """A row for every arm and round: tokens/s, TTFT, and the ratios to that round's single adapter."""
    arguments = server_arguments(root, cache, model)
    arguments += ["--no-prefix-cache", "--adapter-memory-mib", "4096", "--max-batch", str(max(64, load.concurrency))]
    draws = {name: popularity(name, count) for name in (ZIPF, UNIFORM)}
    with ServerProcess(arguments) as server:

        def run(ids: Sequence[str]) -> dict[str, float]:
            return _drive(server, ids, load)

        run([adapter_id(0)] * load.requests)
        for number in range(rounds):
            order = [ONE, ZIPF, UNIFORM] if number % 2 == 0 else [UNIFORM, ZIPF, ONE]
            found: dict[str, dict[str, float]] = {}
            for name in order:
                if name == ONE:
                    found[ONE] = run([adapter_id(0)] * load.requests)
                    continue
                draw = random.Random(f"{name} {number}")
                ids = [adapter_id(draws[name](draw)) for _ in range(load.requests)]
                drop_page_cache(root)
                found[f"{name} from disk"] = run(ids)
                found[f"{name} in memory"] = run(ids)
            for arm in ARMS:
                one = {key: found[arm][key] for key in _NUMBERS}
                ratios = {f"{key}_ratio": round(found[arm][key] / found[ONE][key], 4) for key in _NUMBERS}
                yield {"arm": arm, "round": number, **one, **ratios, "others_share": found[arm]["others_share"]}


def summary(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Medians over the rounds, by arm."""
    found = []
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        keys = [key for key in own[0] if key not in ("arm", "round")]
        found.append(
            {"arm": arm, **{key: round(statistics.median(float(str(r[key])) for r in own), 4) for key in keys}}
        )
    return found


def drop_page_cache(root: Path) -> None:
    """What of the adapters' files is in the system's cache is read from the disk again."""
    for file in (root / "adapters").rglob("*.pack"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _drive(server: ServerProcess, ids: Sequence[str], load: Load) -> dict[str, float]:
    job = Job(
        "overtone",
        server.address,
        requests=load.requests,
        concurrency=load.concurrency,
        new_tokens=load.new_tokens,
        adapters=tuple(ids),
    )
    command = [sys.executable, "-W", "ignore", "-m", "bench.peers.drive", str(server.process.pid)]
    done = subprocess.run(
        command, input=json.dumps(dataclasses.asdict(job)), stdout=subprocess.PIPE, text=True, check=True
    )
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers
