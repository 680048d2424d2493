"""vLLM and Overtone on the same model, prompts, adapters and client, cell by cell in turn; rows and a plot.

All servers stay resident, because idle ones use no CPU to speak of, and one is driven at a time. Rounds alternate their
direction. The client and the share of the machine that others used are in `drive.py` and `quiet.py`.

Usage: python -m bench.peers.compare [--repeats 5] [--only TEXT]... [--env DIR] [--out bench/results/peers]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from bench.facts import commit, cpu
from bench.peers import install, report
from bench.peers.adapters import write_set
from bench.peers.cells import CONTEXT, Cell, Configuration, cells, configurations
from bench.peers.servers import OvertoneServer, PeerFailed, Server, VllmServer, preload_libraries
from bench.peers.workload import Job

from overtone.models.base import model_source

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    repeats: int
    requests: int
    tokens: int
    count: int
    distinct: int
    max_loras: int
    kv_gib: int
    dtype: str
    vllm_dtype: str
    preload: bool
    model: str
    store: Path
    env: Path
    only: tuple[str, ...]


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--requests", default=64, show_default=True, help="Per run; a sixteenth of it where one runs at a time.")
@click.option("--tokens", default=64, show_default=True, help="New tokens per request.")
@click.option("--count", default=10_000, show_default=True, help="Adapters registered where many are.")
@click.option("--distinct", default=64, show_default=True, help="Adapters in use where many are.")
@click.option("--max-loras", default=32, show_default=True, help="vLLM's slots.")
@click.option("--kv-gib", default=1, show_default=True, help="vLLM's memory for keys and values.")
@click.option("--dtype", default="auto", show_default=True, help="Overtone's.")
@click.option("--vllm-dtype", default="float32", show_default=True)
@click.option("--preload/--no-preload", default=True, show_default=True, help="tcmalloc and Intel's OpenMP for vLLM.")
@click.option("--model", default="demo", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path(".overtone"), show_default=True)
@click.option("--env", type=click.Path(path_type=Path), default=Path(".overtone/peers/venv"), show_default=True)
@click.option("--only", multiple=True, help="Only cells whose configuration and label contain one of these.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/peers"), show_default=True)
def main(out: Path, **values: object) -> None:
    """Installs the peer if need be, measures, prints a table, writes OUT.jsonl and OUT.png."""
    options = Options(**values)  # type: ignore[arg-type]
    install.install(options.env)
    chosen = [c for c in cells() if _wanted(c, options.only) or _is_reference(c, options.only)]
    if not chosen:
        raise click.BadParameter("no cell matches", param_hint="--only")
    with ExitStack() as stack:
        servers = start(options, {c.configuration for c in chosen}, stack)
        rows = measure(options, chosen, servers)
    report.write_rows(rows, out.with_suffix(".jsonl"))
    report.show(rows)
    report.plot(rows, out.with_suffix(".png"))


def _wanted(cell: Cell, only: tuple[str, ...]) -> bool:
    return not only or any(text in f"{cell.configuration}: {cell.label}" for text in only)


def _is_reference(cell: Cell, only: tuple[str, ...]) -> bool:
    """Whether a wanted cell's rate is half of this one's."""
    return any(c.half_of == cell.label and c.configuration == cell.configuration and _wanted(c, only) for c in cells())


def start(options: Options, names: set[str], stack: ExitStack) -> dict[str, Server]:
    """The servers of these configurations, each with its adapters; the stack stops them."""
    started: dict[str, Server] = {}
    wanted = [c for c in configurations(options.count, options.max_loras) if c.name in names]
    for configuration in wanted:
        server = stack.enter_context(_start_one(options, configuration))
        started[configuration.name] = server
        for adapters in configuration.sets:
            exact = adapters if configuration.registered else replace(adapters, count=options.distinct)
            server.load(write_set(exact, _modules(options), options.store / "peers" / "folders"))
    return started


def _start_one(options: Options, configuration: Configuration) -> Server:
    folder = options.store / "peers"
    if configuration.system == "overtone":
        store = folder / f"{configuration.name}-{configuration.registered}"
        return OvertoneServer(options.model, store, options.store / "models", options.dtype, configuration.flags)
    flags = (*configuration.flags, "--max-model-len", str(CONTEXT))
    preload = preload_libraries(options.env) if options.preload else []
    source = Path(model_source(options.model, options.store / "models"))
    log = folder / f"{configuration.name}.log"
    return VllmServer(options.env, source, options.vllm_dtype, flags, preload, options.kv_gib, log)


def _modules(options: Options) -> Mapping[str, tuple[int, int]]:
    """Shapes of the adapted linears, from the model's own configuration; Llama's layout."""
    source = Path(model_source(options.model, options.store / "models"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention["o_proj"] = (hidden, queries)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    parts = {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}
    return {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in parts.items()}


def measure(options: Options, chosen: list[Cell], servers: Mapping[str, Server]) -> list[report.Row]:
    """Round 0 is the warm-up and dropped; afterwards every cell once a round."""
    samples: dict[Cell, list[report.Sample]] = {cell: [] for cell in chosen}
    jobs: dict[Cell, Job] = {}
    for index in range(options.repeats + 1):
        for cell in _in_order(chosen, backwards=index % 2 == 1 and index > 1):
            server = servers[cell.configuration]
            jobs[cell] = job = _job(options, cell, server, chosen, samples if index else {})
            sample = drive(options.env, job, server.pid)
            if index:
                samples[cell].append(sample)
            print(f"round {index} {cell.configuration}: {cell.label}: {sample}", flush=True)
    about = conditions(options)
    return [_row(cell, jobs[cell], samples[cell], servers[cell.configuration], about) for cell in chosen]


def _in_order(chosen: list[Cell], *, backwards: bool) -> list[Cell]:
    return chosen[::-1] if backwards else chosen


def _job(
    options: Options, cell: Cell, server: Server, chosen: list[Cell], samples: Mapping[Cell, list[report.Sample]]
) -> Job:
    requests = max(1, options.requests // 16) if cell.concurrency == 1 else options.requests
    system = "vllm" if isinstance(server, VllmServer) else "overtone"
    ids = replace(cell.adapters, count=options.distinct).ids if cell.adapters else ()
    rate = 0.0
    if cell.half_of:
        reference = next(c for c in chosen if (c.configuration, c.label) == (cell.configuration, cell.half_of))
        measured = samples.get(reference)
        rate = measured[0]["tokens_per_s"] / options.tokens / 2 if measured else 1.0
    return Job(
        system, server.address, cell.kind, requests, cell.concurrency, rate,
        long_tokens=cell.long_tokens, new_tokens=options.tokens, adapters=ids,
    )  # fmt: skip


def drive(env: Path, job: Job, server_pid: int) -> report.Sample:
    """One run of the client process. Raises PeerFailed with what it wrote if it fails."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "proto"))
    command = [str(env.absolute() / "bin" / "python"), "-m", "bench.peers.drive", str(server_pid)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise PeerFailed(f"the client failed on {job.target}:\n{done.stderr[-4000:]}")
    sample: dict[str, float] = json.loads(done.stdout)
    return sample


def _row(cell: Cell, job: Job, samples: list[report.Sample], server: Server, about: Mapping[str, object]) -> report.Row:
    asked = {k: v for k, v in asdict(job).items() if k not in ("address", "adapters")} | {"distinct": len(job.adapters)}
    measured = report.Measured(cell.label, job.target, cell.configuration, asked, samples)
    return report.row(measured, {**about, "settings": server.settings})


def conditions(options: Options) -> dict[str, object]:
    preload = [Path(p).name for p in preload_libraries(options.env)] if options.preload else []
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "vllm": install.VERSION,
        "torch": install.TORCH,
        "model": options.model,
        "registered": options.count,
        "vllm_preload": preload,
        "vllm_kv_gib": options.kv_gib,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
