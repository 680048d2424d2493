"""What happens between the steps of a run: history, evaluation, early stopping, checkpoints, and going on from one."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from overtone.tuning.checkpoint import random_state, set_random_state, write_checkpoint
from overtone.tuning.data import Position, Tally, TuningData
from overtone.tuning.history import History
from overtone.tuning.loss import mean_loss
from overtone.tuning.provenance import versions
from overtone.tuning.run_folder import RunFolder
from overtone.tuning.trainer import TuningTrainer

log = logging.getLogger(__name__)

_EVALUATIONS = 10


class Conductor(TrainerCallback):
    """best: the evaluation with the least loss: step, loss and, with early stopping, the state that had it."""

    def __init__(self, trainer: TuningTrainer, data: TuningData, history: History, folder: RunFolder) -> None:
        self._trainer = trainer
        self._data = data
        self._history = history
        self._folder = folder
        self._resumed: dict[str, Any] | None = None
        self._seen = 0
        self._stale = 0
        self._versions = versions()
        self._since = time.monotonic()
        self.total_steps = trainer.args.max_steps
        self.step = 0
        self.before: float | None = None
        self.last: float | None = None
        self.best: dict[str, Any] | None = None
        trainer.stream = data.stream(Position())

    @property
    def last_loss(self) -> float | None:
        return self._trainer.report.loss

    @property
    def stopped(self) -> bool:
        patience = self._trainer.config.patience
        return patience is not None and self._stale >= patience

    @property
    def done(self) -> bool:
        return self.stopped or self.step >= self.total_steps

    def resume(self, saved: dict[str, Any]) -> None:
        """To be called before training begins; the optimiser's part follows when there is one."""
        if saved["versions"] != self._versions:
            log.warning(
                "the run began with %s: to the last bit it may not be what it would have been", saved["versions"]
            )
        self._resumed = saved
        self._trainer.tuned.restore(saved["tuned"])
        self._trainer.stream = self._data.stream(Position(**saved["position"]))
        self._trainer.skipped = saved["skipped"]
        if self._data.samples is None:  # otherwise all has just been counted again
            self._data.intake.tally = Tally.restored(saved["tally"])
        self.step, self._seen, self._stale = saved["step"], saved["seen"], saved["stale"]
        self.before, self.last, self.best = saved["before"], saved["last"], saved["best"]
        self._history.cut(self.step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._resumed is None:
            self.before = self.last = self._evaluate()
            return
        state.global_step = self.step
        self._trainer.restore_learning(self._resumed["learning"])
        set_random_state(self._resumed["random"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        config = self._trainer.config
        self.step = state.global_step
        self._record()
        every = config.eval_every or max(1, self.total_steps // _EVALUATIONS)
        if self._data.evaluation and (self.step % every == 0 or self.step == self.total_steps):
            self.last = self._evaluate()
        if config.save_every and self.step % config.save_every == 0:
            self._save()
        control.should_training_stop = control.should_training_stop or self.done
        return control

    def _record(self) -> None:
        report = self._trainer.report
        self._seen += report.samples
        now = time.monotonic()
        row = {
            "step": self.step,
            "loss": report.loss,
            "penalty": report.penalty if math.isfinite(report.penalty) else None,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "learned_tokens": report.learned,
            "epoch": self._seen / self._data.samples if self._data.samples else None,
            "seconds": round(now - self._since, 3),
        }
        self._since = now
        self._history.add(row)

    def _evaluate(self) -> float | None:
        """The loss on the evaluation set; None without one. A loss that is not finite is worse than any other."""
        if not self._data.evaluation:
            return None
        trainer = self._trainer
        assert trainer.model is not None
        loss = mean_loss(trainer.model, trainer.summed_loss, self._data.evaluation, trainer.args.device)
        self._history.add({"step": self.step, "eval_loss": loss if math.isfinite(loss) else None})
        if self.best is None or loss < self.best["loss"] or not math.isfinite(self.best["loss"]):
            keeps = trainer.config.patience is not None
            self.best = {"step": self.step, "loss": loss, "state": self._state() if keeps else {}}
            self._stale = 0
        else:
            self._stale += 1
        self._since = time.monotonic()
        return loss

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._trainer.tuned.state().items()}

    def _save(self) -> None:
        assert self._trainer.stream is not None
        content = {
            "versions": self._versions,
            "step": self.step,
            "tuned": self._state(),
            "learning": self._trainer.learning_state(),
            "random": random_state(),
            "position": self._trainer.stream.position.state(),
            "tally": self._data.intake.tally.state(),
            "skipped": self._trainer.skipped,
            "seen": self._seen,
            "stale": self._stale,
            "before": self.before,
            "last": self.last,
            "best": self.best,
        }
        write_checkpoint(self._folder.path, content)
