"""Tokens/s of the default model: base only and with 16 and 64 distinct adapters, at 16 and 64 concurrent requests.

The server runs in its own process; this one is the client (closed loop: the next request starts when one ends). Beside it,
in a third process, transformers' own `generate` on one padded batch of the same prompts. Rounds are interleaved, medians
reported, and each row carries its ratio to the base-only row of the same round, because machines are noisy.

Usage: python -m bench.throughput [--rounds 5] [--tokens 64] [--model demo] [--store .overtone] [--out bench/results/NAME]
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from bench.facts import commit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from overtone.api.cli.process import ServerProcess, side_store_arguments
from overtone.api.cli.samples import FAMILIES, write_sample_adapter
from overtone.client import AsyncClient, Client

REQUESTS = 64
PROMPT = "Question {i}: what should a traveller see in the city of Paris in {i} days?"


@dataclass(frozen=True)
class Cell:
    """One setting: `distinct` adapters shared by the requests (0: base only), `concurrency` requests at a time."""

    system: str
    distinct: int
    concurrency: int

    @property
    def label(self) -> str:
        return f"{self.system} {f'{self.distinct} adapters' if self.distinct else 'base only'} @{self.concurrency}"


CELLS = [Cell("overtone", distinct, concurrency) for concurrency in (16, 64) for distinct in (0, 16, 64)]
PEERS = [Cell("transformers padded generate", 0, concurrency) for concurrency in (16, 64)]


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="New tokens per request.")
@click.option("--coefficients", default=1000, show_default=True, help="Per module; q_proj and v_proj are adapted.")
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path(".overtone"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/throughput"))
def main(rounds: int, tokens: int, coefficients: int, model: str, dtype: str, store: Path, out: Path) -> None:
    """Measures, prints a table, writes OUT.jsonl and OUT.png."""
    samples: dict[Cell, list[float]] = {cell: [] for cell in (*CELLS, *PEERS)}
    arguments = [*side_store_arguments(store, "bench", model), "--dtype", dtype, "--max-batch", "64"]
    with ServerProcess(arguments) as server, server.client() as client:
        ids = _load_adapters(client, coefficients)
        _run(server.address, Cell("overtone", 64, 64), ids, 8)  # warm-up: every adapter resident, every path taken
        with Progress() as progress:
            task = progress.add_task("measuring", total=rounds * len(samples))
            for index in range(rounds):
                for cell in CELLS[:: 1 if index % 2 == 0 else -1]:
                    samples[cell].append(_run(server.address, cell, ids, tokens))
                    progress.advance(task)
                for cell in PEERS:
                    samples[cell].append(_peer(model, str(server.fields["dtype"]), store, cell, tokens))
                    progress.advance(task)
        rows = _rows(samples, _conditions(server, client, rounds, tokens, coefficients))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _print(rows)
    _plot(rows, out.with_suffix(".png"))


def _load_adapters(client: Client, coefficients: int) -> list[str]:
    model = client.model()
    modules = {m.name: (m.out_features, m.in_features) for m in model.modules if m.name.endswith(("q_proj", "v_proj"))}
    ids = [f"bench-{seed}-{coefficients}" for seed in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        for seed, adapter_id in enumerate(ids):
            path = Path(folder) / adapter_id
            family = FAMILIES[seed % 2]
            write_sample_adapter(path, modules, family=family, seed=seed, coefficients=coefficients, norm=2.0)
            client.adapters.load(path, id=adapter_id)
    return ids


def _run(address: str, cell: Cell, ids: list[str], tokens: int) -> float:
    """Generated tokens per second over REQUESTS requests."""
    return asyncio.run(_closed_loop(address, cell, ids, tokens))


async def _closed_loop(address: str, cell: Cell, ids: list[str], tokens: int) -> float:
    queue = list(range(REQUESTS))
    generated = 0

    async def worker(client: AsyncClient) -> None:
        nonlocal generated
        while queue:
            i = queue.pop()
            adapter = ids[i % cell.distinct] if cell.distinct else None
            answer = await client.generate(PROMPT.format(i=i), adapter=adapter, max_new_tokens=tokens, ignore_eos=True)
            generated += len(answer.token_ids)

    async with AsyncClient(address, timeout=3600.0) as client:
        started = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(cell.concurrency)))
        return generated / (time.perf_counter() - started)


_PEER_PROGRAM = """
import json, sys, time, torch
from pathlib import Path
from overtone.models.base import model_source
from transformers import AutoModelForCausalLM, AutoTokenizer
model_name, dtype, cache, prompt, batch, tokens, requests = json.loads(sys.argv[1])
source = model_source(model_name, Path(cache))
tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
def run(indices, n):
    inputs = tokenizer([prompt.format(i=i) for i in indices], return_tensors="pt", padding=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)
run(range(batch), 2)
started = time.perf_counter()
for first in range(0, requests, batch):
    run(range(first, first + batch), tokens)
print(requests * tokens / (time.perf_counter() - started))
"""


def _peer(model: str, dtype: str, store: Path, cell: Cell, tokens: int) -> float:
    cache = str(store / "models")
    settings = [model, dtype, cache, PROMPT, cell.concurrency, tokens, REQUESTS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEER_PROGRAM, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def _conditions(
    server: ServerProcess, client: Client, rounds: int, tokens: int, coefficients: int
) -> dict[str, object]:
    import torch
    import transformers

    info = client.model()
    return {
        "model": info.name,
        "dtype": info.dtype,
        "device": info.device,
        "requests": REQUESTS,
        "new_tokens": tokens,
        "coefficients": coefficients,
        "adapted": "q_proj and v_proj, LoCA and sDCTFT alternating",
        "rounds": rounds,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _rows(samples: dict[Cell, list[float]], conditions: dict[str, object]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for cell, values in samples.items():
        base = samples[Cell("overtone", 0, cell.concurrency)]
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        rows.append(
            {
                **asdict(cell),
                "tokens_per_s_median": round(statistics.median(values), 2),
                "ratio_to_base_median": round(statistics.median(ratios), 4),
                "tokens_per_s": [round(value, 2) for value in values],
                "ratio_to_base": [round(ratio, 4) for ratio in ratios],
                **conditions,
            }
        )
    return rows


def _print(rows: list[dict[str, object]]) -> None:
    table = Table(title="Tokens/s (median of rounds)")
    for column in ("system", "adapters", "concurrent", "tokens/s", "of base"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        ratio = f"{row['ratio_to_base_median']:.2f}"
        values = (row["system"], row["distinct"], row["concurrency"], row["tokens_per_s_median"], ratio)
        table.add_row(*(str(value) for value in values))
    Console().print(table)


def _plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = [
        ("base only", "#4c4c4c", lambda r: r["system"] == "overtone" and r["distinct"] == 0),
        ("16 distinct adapters", "#2a7fba", lambda r: r["distinct"] == 16),
        ("64 distinct adapters", "#7b3fa0", lambda r: r["distinct"] == 64),
        ("transformers, padded batch, base only", "#c9a227", lambda r: r["system"] != "overtone"),
    ]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.2
    for offset, (label, colour, chosen) in enumerate(series):
        picked = sorted(filter(chosen, rows), key=lambda r: r["concurrency"])
        positions = [index + (offset - 1.5) * width for index in range(len(picked))]
        heights = [row["tokens_per_s_median"] for row in picked]
        bars = axes.bar(positions, heights, width, label=label, color=colour)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks([0, 1], ["16 concurrent requests", "64 concurrent requests"])
    axes.set_ylabel("generated tokens per second")
    first = rows[0]
    axes.set_title(f"{first['model']} model, {first['dtype']}, {first['cores']} cores of {first['cpu']}", fontsize=10)
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
