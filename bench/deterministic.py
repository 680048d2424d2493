"""What `--deterministic` costs: the time of prompt and decode steps beside the ordinary mode's, base only and with adapters.

Both modes are loaded in this process and take turns, step for step on the same tokens; medians and ratios are reported.

Usage: python -m bench.deterministic [--rounds 5] [--steps 16] [--model demo] [--store .overtone] [--out bench/results/NAME]
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from overtone.adapters.resident import make_resident
from overtone.engine.config import EngineConfig
from overtone.engine.detokenizer import Detokenizer
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import Scheduler
from overtone.engine.sequence import Sequence
from overtone.engine.types import Request, SamplingParams, StoppingParams
from overtone.kernels import DCT, Delta, Term, sparse_core
from overtone.models.base import BaseModel, load_base_model

SEQUENCES = (1, 16, 64)
PROMPT_TOKENS = 32
Adapter = Mapping[str, Any] | None


@dataclass(frozen=True)
class Times:
    """Seconds: of all steps until every sequence has its first token, and of a median decode step after that."""

    prompts_s: float
    decode_s: float


def random_adapter(base: BaseModel, seed: int, coefficients: int) -> Adapter:
    """LoCA on q_proj and v_proj."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, shape in base.modules.items():
        if name.endswith(("q_proj", "v_proj")):
            rows, cols = (torch.randint(0, size, (coefficients,), generator=generator) for size in shape)
            values = 0.01 * torch.randn(coefficients, generator=generator)
            deltas[name] = Delta((Term(DCT, sparse_core(rows, cols, values, shape), DCT),), shape)
    return make_resident(f"bench-{seed}", "loca", deltas).deltas


def measure(base: BaseModel, adapters: list[Adapter], steps: int) -> Times:
    """Greedy generation of `steps` tokens for a sequence with each of `adapters`, without anything but the model."""
    config = EngineConfig(
        max_batch=len(adapters), cache_pages=8 * len(adapters) + 128, deterministic=base.deterministic
    )
    scheduler, runner = Scheduler(config), ModelRunner(base, config)
    for i, adapter in enumerate(adapters):
        ids = tuple((7 * i + 31 * k) % base.vocab_size for k in range(PROMPT_TOKENS))
        request = Request(str(i), ids, SamplingParams(), StoppingParams(steps + 1), 0.0, adapter=adapter)
        scheduler.add(Sequence(request, Detokenizer(lambda ids: "", ids)))
    prompts, decodes = 0.0, []
    while any(len(sequence.output_ids) < steps for sequence in scheduler):
        started = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        tokens = runner.run(plan).argmax(-1).tolist()
        taken = time.perf_counter() - started
        completing = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        for chunk in plan.chunks:
            scheduler.advance(chunk, sound=True)
        for sequence, token in zip(completing, tokens, strict=True):
            sequence.output_ids.append(token)
        if plan.prefills:
            prompts += taken
        else:
            decodes.append(taken)
    return Times(prompts, statistics.median(decodes))


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=16, show_default=True, help="New tokens per sequence.")
@click.option("--coefficients", default=1000, show_default=True, help="Per module; q_proj and v_proj are adapted.")
@click.option("--model", default="demo", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path(".overtone"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/deterministic"))
def main(rounds: int, steps: int, coefficients: int, model: str, store: Path, out: Path) -> None:
    """Measures, prints a table, writes OUT.jsonl."""
    modes = [
        load_base_model(model, dtype="float32", device="cpu", cache=store / "models", deterministic=on)
        for on in (False, True)
    ]
    adapters = [random_adapter(modes[0], seed, coefficients) for seed in range(max(SEQUENCES))]
    cells = [(count, adapted) for count in SEQUENCES for adapted in (False, True)]
    samples: dict[tuple[int, bool], list[tuple[Times, Times]]] = {cell: [] for cell in cells}
    for index in range(rounds + 1):  # the first one warms up
        for count, adapted in cells:
            chosen = adapters[:count] if adapted else [None] * count
            ordinary, deterministic = (measure(base, chosen, steps) for base in modes)
            if index:
                samples[count, adapted].append((ordinary, deterministic))
    conditions = {
        "rounds": rounds, "steps": steps, "prompt_tokens": PROMPT_TOKENS, "coefficients": coefficients, "model": model,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    rows = [_row(count, adapted, samples[count, adapted]) | conditions for count, adapted in cells]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _print(rows)


def _row(count: int, adapted: bool, pairs: list[tuple[Times, Times]]) -> dict[str, Any]:
    row: dict[str, Any] = {"sequences": count, "distinct_adapters": count if adapted else 0}
    for part in ("prompts_s", "decode_s"):
        plain, fixed = ([getattr(pair[mode], part) for pair in pairs] for mode in (0, 1))
        row[f"ordinary_{part}"], row[f"deterministic_{part}"] = statistics.median(plain), statistics.median(fixed)
        row[f"ratio_{part}"] = statistics.median(b / a for a, b in zip(plain, fixed, strict=True))
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "sequences", "adapters", "decode ms", "deterministic", "ratio", "prompts ms", "deterministic", "ratio"
    )
    for row in rows:
        cells = [str(row["sequences"]), str(row["distinct_adapters"])]
        for part in ("decode_s", "prompts_s"):
            cells += [f"{1e3 * row[f'{mode}_{part}']:.1f}" for mode in ("ordinary", "deterministic")]
            cells.append(f"{row[f'ratio_{part}']:.2f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
