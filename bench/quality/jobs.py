"""One row of the results: what is to be done for it, and doing it in a process of its own."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bench.facts import conditions
from bench.quality.arms import Rate, arm
from bench.quality.compressed import SOURCE, compressed, random_like
from bench.quality.sources import versions
from bench.quality.tasks import TASKS
from bench.quality.workbench import Row, Setting, Workbench

_NONE = Rate(0.0)
Kind = Literal["rate", "base", "tuned", "compressed", "random"]


@dataclass(frozen=True, slots=True)
class Job:
    """kind: "rate", a learning rate tried on the validation part; "base" with `shots` examples in the prompt; "tuned";
    "compressed", the LoRA `SOURCE` to `total` coefficients; "random", the same of a random delta. arm: its name."""

    kind: Kind
    task: str
    seed: int = 0
    arm: str = ""
    rate: Rate = _NONE
    shots: int = 0
    total: int = 0

    def key(self) -> Row:
        """What tells its row from others."""
        rate = {"lr": self.rate.lr, "location_lr": self.rate.location_lr}
        about = {"kind": self.kind, "task": self.task, "seed": self.seed, "arm": self.arm}
        return {**about, **rate, "shots": self.shots, "total": self.total}


def row_of(bench: Workbench, job: Job) -> Row:
    task, started = TASKS[job.task], time.perf_counter()
    if job.kind == "base":
        found = bench.base(task, job.shots)
    elif job.kind == "rate":
        found = bench.learned(task, arm(job.arm), job.rate, job.seed, None)
    elif job.kind == "tuned":
        found = _tuned(bench, job)
    else:
        found = _compressed(bench, job)
    about: dict[str, object] = {"run_seconds": round(time.perf_counter() - started, 1), "packages": versions()}
    numbers = {name: _plain(value) for name, value in found.items()}
    return {**job.key(), **bench.setting.key(), **numbers, **about, **conditions()}


def lora_folder(setting: Setting, job: Job) -> Path:
    """Where the LoRA that `job` compresses is kept, by all that its numbers depend on."""
    settled = "-".join(f"{value}".replace("/", "_") for value in setting.key().values())
    return setting.work / f"{job.task}-{SOURCE}-{job.rate.lr:g}-{job.seed}-{settled}".replace(" ", "_")


def _tuned(bench: Workbench, job: Job) -> Row:
    chosen = arm(job.arm)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        learned = bench.learned(TASKS[job.task], chosen, job.rate, job.seed, folder)
        scored = bench.score_of(TASKS[job.task], folder)
        if job.arm == SOURCE:
            _keep(folder, lora_folder(bench.setting, job))
    return {"label": chosen.label, "budget": chosen.budget, **learned, **scored}


def _compressed(bench: Workbench, job: Job) -> Row:
    lora = lora_folder(bench.setting, job)
    with tempfile.TemporaryDirectory() as scratch:
        if not lora.exists():
            folder = Path(scratch) / "adapter"
            bench.learned(TASKS[job.task], arm(SOURCE), job.rate, job.seed, folder)
            _keep(folder, lora)
        source, small = lora, Path(scratch) / "small"
        if job.kind == "random":
            source = random_like(lora, Path(scratch) / "random", job.seed)
        found = compressed(source, small, job.total, bench.setting)
        return found if job.kind == "random" else {**found, **bench.score_of(TASKS[job.task], small)}


def _keep(folder: Path, target: Path) -> None:
    """In one step: a job that is cut short leaves no half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent))
    shutil.copytree(folder, staging / "adapter")
    if not target.exists():
        (staging / "adapter").rename(target)
    shutil.rmtree(staging)


def _plain(value: object) -> object:
    """What JSON has: no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Worker:
    """A process's own workbench, made when it starts."""

    bench: Workbench

    @classmethod
    def start(cls, setting: Setting, threads: int) -> None:
        torch.set_num_threads(threads)
        cls.bench = Workbench(setting)

    @classmethod
    def run(cls, job: Job) -> Row:
        return row_of(cls.bench, job)


def same(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in key.items())
