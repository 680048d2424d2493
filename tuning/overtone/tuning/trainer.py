"""transformers' Trainer around a `Tuned`: it drives the steps, the schedule and the callbacks; what is in a step is ours.

Only what both ends of the supported range of transformers (5.17 to 5.23) document is relied upon: the Trainer sees one long
epoch of `max_steps` batches, each of which is a whole optimiser step, and saves, evaluates and logs nothing by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from overtone.errors import InvalidRequest
from overtone.tuning.config import TuneConfig
from overtone.tuning.data import Step, StepStream
from overtone.tuning.loss import SummedLoss, on_device
from overtone.tuning.methods.types import Tuned

_NAMED_PLACES = 8


@dataclass(slots=True)
class StepReport:
    """What the last step was. loss: per learned token, without the penalty; None: it was skipped."""

    loss: float | None = None
    penalty: float = 0.0
    grad_norm: float | None = None
    lr: float = 0.0
    learned: int = 0
    samples: int = 0


class TuningTrainer(Trainer):
    """One run. `stream` may be set until `train` begins; `skipped` counts steps without a finite loss and gradient."""

    def __init__(self, config: TuneConfig, model: nn.Module, tuned: Tuned, *, total_steps: int, folder: Path) -> None:
        super().__init__(model=model, args=training_arguments(config, total_steps, folder, model))
        self.remove_callback(PrinterCallback)
        self.config = config
        self.tuned = tuned
        self.stream: StepStream | None = None
        self.report = StepReport()
        self.skipped = 0
        self.summed_loss = SummedLoss(model)
        self.parameters = [parameter for group in tuned.groups for parameter in group.parameters]

    def get_train_dataloader(self) -> Any:
        return self.stream

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            config = self.config
            groups = [
                {
                    "params": list(group.parameters),
                    "lr": config.learning_rate if group.lr is None else group.lr,
                    "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
                }
                for group in self.tuned.groups
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        return self.optimizer

    def learning_state(self) -> dict[str, Any]:
        """Of the optimiser and the schedule, which are there while it trains."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}

    def restore_learning(self, state: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """All batches of one optimiser step: loss = sum over tokens / tokens of the step + the method's penalty."""
        step: Step = inputs["step"]
        self.tuned.begin_step(self.state.global_step)
        model.train()
        loss = self._accumulated(model, step)
        penalty = self._penalised()
        norm = self._clipped()
        finite = bool(torch.isfinite(loss + penalty)) and math.isfinite(norm)
        if not finite:
            self._refuse_or_skip(step, loss + penalty, norm)
        self.report = StepReport(
            loss=float(loss) if finite else None,
            penalty=float(penalty),
            grad_norm=norm if finite else None,
            lr=self.create_optimizer().param_groups[0]["lr"],
            learned=step.learned,
            samples=len(step.places),
        )
        return loss if finite else torch.zeros_like(loss)

    def _accumulated(self, model: nn.Module, step: Step) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for batch in step.batches:
            loss = self.summed_loss(model, on_device(batch, self.args.device)) / step.learned
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _penalised(self) -> torch.Tensor:
        penalty = self.tuned.penalty()
        if penalty is None:
            return torch.zeros((), device=self.args.device)
        if penalty.requires_grad:  # what it is of may not learn in this step
            self.accelerator.backward(penalty)
        return penalty.detach()

    def _clipped(self) -> float:
        """The norm of all gradients before they are scaled down."""
        limit = self.config.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def _refuse_or_skip(self, step: Step, loss: torch.Tensor, norm: float) -> None:
        """Without gradients AdamW leaves everything as it is: parameters, moments and its own count of steps."""
        self.skipped += 1
        skips = self.config.nonfinite == "skip"
        if skips and self.skipped <= self.config.nonfinite_limit:
            for parameter in self.parameters:
                parameter.grad = None
            return
        what = f"the loss is {float(loss):g}" if not torch.isfinite(loss) else f"the gradient's norm is {norm:g}"
        more = f" and {len(step.places) - _NAMED_PLACES} more" if len(step.places) > _NAMED_PLACES else ""
        raise InvalidRequest(
            f"step {self.state.global_step + 1}: {what}, on {', '.join(map(str, step.places[:_NAMED_PLACES]))}{more}; "
            + (f"more than nonfinite_limit ({self.config.nonfinite_limit}) such steps" if skips else "lower the lr?"),
            field="nonfinite_limit" if skips else "nonfinite",
        )


def warmup_steps(config: TuneConfig, total_steps: int) -> int:
    return math.ceil(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)


def training_arguments(config: TuneConfig, total_steps: int, folder: Path, model: nn.Module) -> TrainingArguments:
    """Of the Trainer's own services none but the schedule is used."""
    warmup = warmup_steps(config, total_steps)
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total_steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        max_grad_norm=0.0,  # done before the Trainer sees a gradient, where what is not finite can be left out
        seed=config.seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # the Trainer would split batches among all there are
    return arguments
