"""What every way of tuning is to the loop that trains it.

A method is chosen and checked before the model is there (`Method`), then attached to one (`Tuned`): it freezes the base,
wraps the layers that it adapts, and from then on the loop knows only this interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that learn alike. name: stable, for logs and checkpoints; lr: None: the run's own."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float | None = None
    weight_decay: float | None = None


class Tuned(Protocol):
    """A model with a method attached."""

    @property
    def trainable_parameters(self) -> int:
        """Numbers that the optimiser ever changes (LoCA: coefficients and locations)."""

    @property
    def groups(self) -> Sequence[Group]:
        """All trainable parameters, each in one group."""

    def begin_step(self, step: int) -> None:
        """Told before each optimiser step, from 0 and also after a resume; decides what learns in it (LoCA's phases)."""

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss (DCFT's orthogonality), a scalar; None: nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that training changes, and all that was drawn at random, for a checkpoint."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave. Raises `InvalidRequest` if it is of another method, budget or model."""

    def deltas(self) -> dict[str, torch.Tensor]:
        """delta_W (p, q) in float32 of every adapted layer, dense: for tests, and for merging into the base."""

    def save(self, folder: Path, base_name: str) -> None:
        """Writes an adapter folder that a server loads. base_name: for base_model_name_or_path."""


class Method(Protocol):
    """A method with its budget, checked. name: "loca", "sdctft", "dcft", "pica", "lora", "fourierft"."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> Sequence[str]:
        """Last components of the names of the layers that are adapted (q_proj, v_proj)."""

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> Tuned:
        """Freezes the model and adapts its layers. The base's weights are not changed, and zero-initialised methods start
        at the base's outputs exactly. Raises `InvalidRequest` with the field for targets or sizes that do not fit."""
