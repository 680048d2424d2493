"""How `bench.gpu` measures its cells, and what it measures beside them."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from bench.roofline import Family
from bench.steps.adapters import RandomAdapters
from bench.steps.cells import Cell, Row, middle
from bench.steps.setting import Setting
from bench.timing import Clock

from overtone.errors import UnsupportedModel
from overtone.models.merged import MergedWeights


class Rounds:
    """Measures groups of cells, each beside its own base, round by round."""

    def __init__(self, setting: Setting, times: int) -> None:
        self._setting, self._times = setting, times
        self._clock = Clock(setting.base.device)

    def decode(self, cells: list[Cell]) -> None:
        """The first is the base model's."""
        base = 0.0
        for cell in cells:
            plan = cell.plan(self._setting)
            cell.gpu.append(self._clock.replays(self._setting.recorded(plan), self._times))
            cell.step.append(self._setting.seconds(partial(self._setting.run, plan), self._times))
            base = base or cell.gpu[-1]
            cell.over.append(cell.gpu[-1] / base - 1)

    def prompts(self, cells: list[Cell]) -> None:
        """Of as many prompts each: those of the base model before the others."""
        base: dict[int, float] = {}
        for cell in cells:
            taken = self.step(cell)
            cell.over.append(taken / base.setdefault(cell.distinct, taken) - 1)

    def step(self, cell: Cell) -> float:
        plan = cell.plan(self._setting)
        self._setting.run(plan)
        cell.step.append(self._setting.seconds(partial(self._setting.run, plan), self._times))
        return cell.step[-1]


def checked(setting: Setting, cells: Iterable[Cell]) -> list[Cell]:
    """Every cell once, so that everything is compiled, recorded and on the device; those that are fit to be measured.
    Adapters must change what the base model says. A cell of the base model comes before those of its kind."""
    answers: dict[tuple[str, int], torch.Tensor] = {}
    fit = []
    for cell in cells:
        started, where = time.monotonic(), f"{cell.phase} {cell.label} @{cell.rows}, {cell.distinct} distinct"
        try:
            logits = setting.run(cell.plan(setting)).float()
            problem = _problem(cell, logits, answers)
        except Exception as raised:  # one family's fault must not cost the others their hour on a GPU
            if cell.family is None or "CUDA error" in str(raised):
                raise
            traceback.print_exc()
            problem = repr(raised)
        if not problem:
            fit.append(cell)
        took = f"{time.monotonic() - started:.1f} s"
        print(f"WRONG: {where}: {problem}" if problem else f"ready: {where}, {took}", flush=True)
    return fit


def _problem(cell: Cell, logits: torch.Tensor, answers: dict[tuple[str, int], torch.Tensor]) -> str:
    """answers: the base model's, by phase and rows."""
    if not bool(logits.isfinite().all()):
        return "logits that are not finite"
    key = cell.phase, len(logits)
    if cell.family is None:
        answers[key] = logits.clone()
    elif cell.adapted is None and bool((logits == answers[key]).all(1).any()):
        return "a row has an adapter that changes nothing"
    return ""


def merging(setting: Setting, families: Iterable[Family], rounds: int, times: int) -> Iterator[Row]:
    """One adapter in the weights: how long it takes to put it there, and a prompt with it, in turn with the clean model."""
    random, measured = RandomAdapters(setting.base.modules, setting.base.device), Rounds(setting, times)
    weights = MergedWeights(setting.base.model, setting.base.frames, setting.base.device)
    for family in families:
        each = [random.make(family, seed) for seed in range(2)]
        tokens = setting.sizes.prompt
        clean = Cell("prompt", "base", tokens, distinct=1)
        merged = Cell("prompt", f"{family.name}; merged", tokens, family, 1, merged=True)
        try:
            first = setting.seconds(partial(weights.merge, each[1]), 1)
        except UnsupportedModel as problem:
            print(f"nothing is merged: {problem}")
            break
        taken = []
        for number in range(rounds):
            weights.unmerge()
            base = measured.step(clean)
            taken.append(setting.seconds(partial(weights.merge, each[number % 2]), 1))
            merged.over.append(measured.step(merged) / base - 1)
        weights.unmerge()
        yield merged.row(setting)
        yield _row("merge", family) | {"first_ms": round(first * 1e3, 3), "step_ms": middle(taken), "merged": True}


def packing(setting: Setting, families: Iterable[Family]) -> list[Row]:
    """Bytes of an adapter on the device, and how long a thread of the host takes to pack it."""
    found = []
    for family in families:
        packed, seconds = setting.packer.again(setting.deltas(family, 0))
        found.append(_row("pack", family) | {"bytes": 4 * packed.room, "step_ms": round(seconds * 1e3, 3)})
    return found


def products(setting: Setting, times: int) -> list[Row]:
    """The base model's large products by themselves."""
    clock, found = Clock(setting.base.device), []
    for rows in setting.sizes.rows:
        replay = setting.products(rows)
        taken = statistics.median(clock.replays(replay, times) for _ in range(5))
        found.append(_row("products", None) | {"rows": rows, "gpu_ms": round(taken * 1e3, 4)})
    return found


def _row(phase: str, family: Family | None) -> Row:
    return {
        "phase": phase, "label": "base" if family is None else family.name, "rows": 0, "distinct": 1, "merged": False,
        "family": None if family is None else family.kind, "size": 0 if family is None else family.size,
    }  # fmt: skip
