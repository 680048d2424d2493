"""The grid: which rows there are to be, which are there already, and who computes the others.

First the learning rates, then the grid seed by seed, so that a run that is cut short has whole seeds; then compression.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from bench.facts import append, read
from bench.quality.arms import ARMS, FIXED, LABELS, LEARNED, Arm, Rate, swept
from bench.quality.compressed import COEFFICIENTS, SOURCE
from bench.quality.jobs import Job, Worker, same
from bench.quality.rates import FURTHER, Tried, best_rate, rates_to_try
from bench.quality.workbench import Row, Setting

SHOTS = (0, 8)
_LAYERS = 60
_SWEEP_SEED = 0


@dataclass(frozen=True)
class Grid:
    """path: the rows; labels: of the arms; layers: that are adapted, by which compression's totals are multiplied."""

    setting: Setting
    path: Path
    tasks: Sequence[str]
    seeds: Sequence[int]
    labels: Sequence[str] = LABELS
    layers: int = _LAYERS
    compress: bool = True

    @property
    def arms(self) -> list[Arm]:
        return [one for one in ARMS if one.label in self.labels]

    def rows(self) -> list[Row]:
        """Those of this setting."""
        found: list[Row] = list(read(self.path)) if self.path.exists() else []
        return [row for row in found if same(row, self.setting.key())]

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        rows = self.rows()
        return [job for job in jobs if not any(same(row, job.key()) for row in rows)]

    def stages(self) -> Iterator[Callable[[], list[Job]]]:
        """What may be done together; a stage's jobs are made from the rows of those before it."""
        yield self.bases
        # LoCA's learned places have the coefficients' rate of the fixed ones.
        free = [label for label in LABELS if label in self.labels or (label == FIXED and LEARNED in self.labels)]
        for labels in ([label for label in free if label != LEARNED], [label for label in free if label == LEARNED]):
            for _ in range(1 + FURTHER):
                yield partial(self._sweep, labels)
        yield lambda: [*self._tuned(), *(self._compressions() if self.compress else ())]

    def bases(self) -> list[Job]:
        return [Job("base", task, shots=shots) for task in self.tasks for shots in SHOTS]

    def tried(self, task: str, label: str) -> Tried:
        """Learning rate -> validation loss, None: it came to grief."""
        key = {"kind": "rate", "task": task, "arm": swept(label).name, "seed": _SWEEP_SEED}
        rows = [row for row in self.rows() if same(row, key)]
        if label == LEARNED:
            lr = best_rate(FIXED, self.tried(task, FIXED)).lr
            return {row["location_lr"]: row["validation_loss"] for row in rows if row["lr"] == lr}
        return {row["lr"]: row["validation_loss"] for row in rows}

    def _sweep(self, labels: Sequence[str]) -> list[Job]:
        found = []
        for label in labels:
            for task in self.tasks:
                lr = best_rate(FIXED, self.tried(task, FIXED)).lr if label == LEARNED else None
                rates = rates_to_try(label, self.tried(task, label), lr)
                found += [Job("rate", task, _SWEEP_SEED, swept(label).name, rate) for rate in rates]
        return found

    def _tuned(self) -> Iterator[Job]:
        rates = {(task, label): self._rate(task, label) for task in self.tasks for label in self.labels}
        for seed in self.seeds:
            for task in self.tasks:
                yield from (Job("tuned", task, seed, one.name, rates[task, one.label]) for one in self.arms)

    def _rate(self, task: str, label: str) -> Rate:
        lr = best_rate(FIXED, self.tried(task, FIXED)).lr if label == LEARNED else None
        return best_rate(label, self.tried(task, label), lr)

    def _compressions(self) -> Iterator[Job]:
        for seed in self.seeds if "LoRA" in self.labels else ():
            for task in self.tasks:
                rate = self._rate(task, "LoRA")
                for n in COEFFICIENTS:
                    yield Job("compressed", task, seed, SOURCE, rate, total=n * self.layers)
                    if seed == self.seeds[0]:
                        yield Job("random", task, seed, SOURCE, rate, total=n * self.layers)


def fill(grid: Grid, workers: int, minutes: float, tell: Callable[[Row], None]) -> int:
    """Appends what is missing, as it comes. Begins nothing after `minutes`. Returns how many rows are missing still, as far
    as that is known before the learning rates are."""
    deadline = time.monotonic() + 60 * minutes
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), Worker.start, (grid.setting, threads)) as pool:
        for stage in grid.stages():
            waiting = grid.missing(stage())
            _work_off(waiting, pool, workers, deadline, lambda row: (append(row, grid.path), tell(row)))
            if waiting:
                return len(waiting)
    return 0


def _work_off(
    waiting: list[Job], pool: ProcessPoolExecutor, workers: int, deadline: float, done: Callable[[Row], object]
) -> None:
    """Takes jobs from `waiting` until it is empty or the time is up."""
    running: set[Future[Row]] = set()
    while running or (waiting and time.monotonic() < deadline):
        while waiting and len(running) < workers and time.monotonic() < deadline:
            running.add(pool.submit(Worker.run, waiting.pop(0)))
        ready, running = wait(running, return_when=FIRST_COMPLETED)
        for future in ready:
            done(future.result())
