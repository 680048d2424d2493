"""A bar on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from overtone.tuning.conductor import Conductor


class Progress(TrainerCallback):
    """Steps, the loss of the last one and the last evaluation."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not sys.stderr.isatty():
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=self._conductor.total_steps, completed=self._conductor.step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            last = self._conductor.last
            loss = self._conductor.last_loss
            text = "skipped" if loss is None else f"loss {loss:.4f}"
            text += "" if last is None else f", evaluation {last:.4f}"
            self._bar.update(self._task, completed=self._conductor.step, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
