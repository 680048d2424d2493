"""What a finished run gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from overtone.tuning.data import Skipped


@dataclass(frozen=True, slots=True)
class TuneResult:
    """folder: holds everything; adapter: the part of it that a server loads; adapter_bytes: of its files; steps: taken, of
    total_steps; train_loss: mean over the last steps, per learned token; eval_loss: of the adapter that was kept, which is
    the one after best_step if there was early stopping; eval_loss_before: of the base alone; samples: in one pass, None if
    they were not counted; skipped: by reason; nonfinite_steps: left out; seconds: of this process, checkpoints before it
    not included."""

    folder: Path
    adapter: Path
    adapter_bytes: int
    trainable_parameters: int
    steps: int
    total_steps: int
    stopped_early: bool
    train_loss: float
    eval_loss: float | None
    eval_loss_before: float | None
    best_step: int | None
    samples: int | None
    truncated: int
    nonfinite_steps: int
    seconds: float
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
