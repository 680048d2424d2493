"""What the methods of our own make of a model: branches beside its layers, to be trained, remembered and saved."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from overtone.adapters.failures import operation
from overtone.adapters.files import PEFT_LAYOUT, Layout
from overtone.models.fingerprint import fingerprint_of
from overtone.tuning.methods.attach import Branch, unwrap, wrap
from overtone.tuning.methods.budget import Budget
from overtone.tuning.methods.state import packed, restore
from overtone.tuning.methods.types import Group


class TunedBranches(ABC):
    """`Tuned` but for what a method has of its own.

    branches: full name of a layer -> its branch; dropout: on the branches' inputs; facts: what a checkpoint remembers
    besides the budget and the base model's fingerprint, JSON.
    """

    layout: Layout = PEFT_LAYOUT

    def __init__(
        self,
        budget: Budget,
        model: nn.Module,
        branches: Mapping[str, Branch],
        *,
        dropout: float = 0.0,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._settings = {**budget.settings(), "base": fingerprint_of(model), **(facts or {})}
        self._targets = list(budget.targets)
        self._model = model
        self._branches = dict(branches)
        wrap(model, branches, dropout)

    @property
    @abstractmethod
    def groups(self) -> Sequence[Group]: ...

    @abstractmethod
    def _contents(self) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        """What the adapter's configuration has of its family, and its tensors."""

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for group in self.groups for parameter in group.parameters)

    def begin_step(self, step: int) -> None:  # noqa: B027 - what has no phases need not say so
        """Everything learns in every step."""

    def penalty(self) -> torch.Tensor | None:
        return None

    def state(self) -> dict[str, torch.Tensor]:
        return packed(self._settings, self._tensors())

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        restore(self._settings, self._tensors(), state)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors themselves; one that several layers share goes by the name of the first."""
        found = {
            f"{name}.{part}": t
            for name, b in self._branches.items()
            for part, t in b.state_dict(keep_vars=True).items()
        }
        names = {id(tensor): name for name, tensor in reversed(found.items())}
        return {name: tensor for name, tensor in found.items() if names[id(tensor)] == name}

    def deltas(self) -> dict[str, torch.Tensor]:
        return {name: branch.dense_delta() for name, branch in self._branches.items()}

    def detach(self) -> None:
        """The model as it was before, but that it stays frozen. What was learned can still be saved."""
        unwrap(self._model, list(self._branches))

    def save(self, folder: Path, base_name: str) -> None:
        """The two files of an adapter. Raises `StoreFailed` if the disk refuses."""
        config, tensors = self._contents()
        config = {
            "base_model_name_or_path": base_name,
            "task_type": "CAUSAL_LM",
            "target_modules": self._targets,
            "bias": "none",
            "inference_mode": True,
            **config,
        }
        stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        with operation("write the adapter's folder"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.layout.config).write_text(json.dumps(config, indent=2), encoding="utf-8")
            (folder / self.layout.weights).write_bytes(safetensors.torch.save(stored, {"format": "pt"}))
