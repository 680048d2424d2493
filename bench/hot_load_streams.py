"""How long a new adapter takes while others stream, and what its coming costs them.

A server of its own process, sixteen streams in another, and a third that loads, uses and deletes adapters (LoCA on q and v,
n = 1000, new locations each), a few a second. Three arms take turns:

    nothing    the streams alone
    requests   beside them as many requests as below, of adapters that were loaded before
    loads      each request's adapter is loaded for it, and deleted after it

    load        from the first byte of UploadAdapter to its answer: durable, validated, in memory
    first token from the beginning of the next request with the new adapter to its first token
    itl         between two pieces of a stream

Usage: python -m bench.hot_load_streams [--rounds 5] [--out bench/results/hot_load_streams.jsonl]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from bench.facts import append, conditions
from bench.million.files import SyntheticAdapters
from bench.peers.stats import percentile
from bench.peers.workload import Job
from rich.console import Console
from rich.table import Table

from overtone.api.cli.process import ServerProcess, side_store_arguments
from overtone.client import Client

STREAMS = 16
NOTHING, REQUESTS, LOADS = ARMS = ("nothing", "requests", "loads")


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=96, show_default=True, help="Of each stream.")
@click.option("--n", default=1000, show_default=True, help="Coefficients a module.")
@click.option("--nice", default=0, show_default=True, help="The server's --nice.")
@click.option("--pause", default=0.2, show_default=True, help="Seconds between two loads.")
@click.option("--model", default="demo", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path(".overtone"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/hot_load_streams.jsonl"))
def main(rounds: int, tokens: int, n: int, nice: int, pause: float, model: str, store: Path, out: Path) -> None:
    """Measures, prints a table, writes OUT and a plot beside it."""
    out.unlink(missing_ok=True)
    about = {"model": model, "n": n, "streams": STREAMS, "nice": nice, **conditions()}
    arguments = [*side_store_arguments(store, "bench-hot-load", model), "--dtype", "float32", "--nice", str(nice)]
    with ServerProcess(arguments) as server, tempfile.TemporaryDirectory() as folder:
        paths = _write_adapters(server, Path(folder), n)
        _round(server, tokens, paths[:4], pause, LOADS)
        for number in range(rounds):
            for arm in ARMS[:: -1 if number % 2 else 1]:
                append({"round": number, "arm": arm, **_round(server, tokens, paths, pause, arm), **about}, out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    _show(rows)
    _plot(rows, out.with_suffix(".png"))


def _write_adapters(server: ServerProcess, root: Path, n: int, count: int = 64) -> list[Path]:
    with server.client() as client:
        layers = [m for m in client.model().modules if m.name.endswith(("q_proj", "v_proj"))]
    made = SyntheticAdapters({m.name: (m.out_features, m.in_features) for m in layers}, n)
    paths = []
    for index in range(count):
        files, path = made.files(3 * index), root / f"hot-{index}"  # each with locations of its own
        path.mkdir()
        (path / files.layout.config).write_bytes(files.config)
        (path / files.layout.weights).write_bytes(files.weights)
        paths.append(path)
    return paths


def _round(server: ServerProcess, tokens: int, paths: Sequence[Path], pause: float, arm: str) -> dict[str, object]:
    """Streams of `tokens`, and what goes on while they run."""
    job = Job("overtone", server.address, requests=STREAMS, concurrency=STREAMS, new_tokens=tokens)
    command = [sys.executable, "-W", "ignore", "-m", "bench.peers.drive", str(server.process.pid)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as streams:
        assert streams.stdin is not None
        assert streams.stdout is not None
        streams.stdin.write(json.dumps(dataclasses.asdict(job)))
        streams.stdin.close()
        found: list[tuple[float, float]] = []
        if arm != NOTHING:
            found += _ask_while(streams, server, paths, pause, load=arm == LOADS)
        numbers = json.load(streams.stdout)
    chosen = {key: numbers[key] for key in ("tokens_per_s", "itl_p50_ms", "itl_p99_ms", "others_share")}
    if not found:
        return chosen
    times, firsts = ([round(1e3 * taken, 2) for taken in parts] for parts in zip(*found, strict=True))
    chosen |= {f"first_token_p{q}_ms": round(percentile(firsts, q), 2) for q in (50, 99)}
    if arm == REQUESTS:
        return chosen
    return {**chosen, **{f"load_p{q}_ms": round(percentile(times, q), 2) for q in (50, 99)}, "load_ms": times}


def _ask_while(
    streams: subprocess.Popen[str], server: ServerProcess, paths: Sequence[Path], pause: float, *, load: bool
) -> Iterator[tuple[float, float]]:
    """(seconds of the load, seconds to the first token) of one adapter after another until the streams end."""
    with Client(server.address) as client:
        if not load:
            client.adapters.load(paths[0], id=paths[0].name)
        time.sleep(2.0)  # until they stream
        for number in range(10**6):
            if streams.poll() is not None:
                break
            path = paths[number % len(paths)] if load else paths[0]
            started = time.perf_counter()
            if load:
                client.adapters.load(path, id=path.name)
            loaded = time.perf_counter()
            client.generate(token_ids=range(100, 110), adapter=path.name, max_new_tokens=1)
            first = time.perf_counter()
            if load:
                client.adapters.delete(path.name)
            yield loaded - started, first - loaded
            time.sleep(pause)
        if not load:
            client.adapters.delete(paths[0].name)


def _show(rows: Sequence[dict[str, object]]) -> None:
    keys = [f"{name}_ms" for name in ("itl_p50", "itl_p99", "load_p50", "load_p99", "first_token_p50")]
    table = Table("arm", "tokens/s", *keys, title="Loading adapters while 16 streams run (medians of rounds)")
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        medians = {
            key: statistics.median(float(str(row[key])) for row in own)
            for key in ("tokens_per_s", *keys)
            if key in own[0]
        }
        table.add_row(arm, *(f"{medians[key]:.1f}" if key in medians else "" for key in ("tokens_per_s", *keys)))
    Console().print(table)


def _plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Left: the times of all loads; right: the streams' p99 with and without loading, a line a round."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    times = sorted(float(taken) for row in rows for taken in row.get("load_ms", ()))  # type: ignore[attr-defined]
    left.plot(times, [(place + 1) / len(times) for place in range(len(times))], color="#2a7fba")
    for limit, share in ((10, 0.5), (30, 0.99)):
        left.plot([limit], [share], "v", color="#b03030", label=f"goal: p{100 * share:g} at most {limit} ms")
    left.set_xlabel("ms from the first byte to the answer")
    left.set_ylabel("share of loads")
    left.set_xlim(left=0)
    left.legend(frameon=False)
    for number in {row["round"] for row in rows}:
        own = [next(row["itl_p99_ms"] for row in rows if row["round"] == number and row["arm"] == arm) for arm in ARMS]
        right.plot(ARMS, own, marker="o", color="#7b3fa0")
    right.set_ylabel("ms between two pieces of a stream, p99")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['cores']} cores of {rows[0]['cpu']}, 16 streams, LoCA n = {rows[0]['n']} on q and v")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
