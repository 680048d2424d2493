"""What tests of tuning need: one small budget of every method, a loss, steps of Adam, tensors that come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from overtone.tuning.methods import AnyMethod, make_method
from overtone.tuning.methods.types import Tuned

TARGETS = ("q_proj", "v_proj", "down_proj")
"""96 x 64, 48 x 64 and 64 x 96 in `tiny_model`."""

BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "loca": {"n": 30, "scale": 0.7, "location_steps": 40, "location_lr": 0.01},
    "sdctft": {"n": 30, "scale": 0.7},
    "dcft": {"d": 4, "rank": 2},
    "pica": {"rank": 5},
    "lora": {"r": 3, "alpha": 5.0, "rslora": True},
    "fourierft": {"n": 30, "scale": 20.0},
}


def small_method(name: str, **changes: Any) -> AnyMethod:
    return make_method(name, **{"targets": TARGETS, **BUDGETS[name], **changes})


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def loss_value(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(loss_of(model, ids))


def parameters_of(tuned: Tuned) -> list[torch.nn.Parameter]:
    return [parameter for group in tuned.groups for parameter in group.parameters]


def perturb(tuned: Tuned, seed: int = 0, strength: float = 0.1) -> None:
    """Moves every parameter somewhere else, locations within and out of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_of(tuned):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=strength)


def adam(tuned: Tuned, lr: float = 0.01) -> torch.optim.AdamW:
    groups = []
    for group in tuned.groups:
        decay = 0.01 if group.weight_decay is None else group.weight_decay
        groups.append({"params": list(group.parameters), "lr": group.lr or lr, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def train(model: Any, tuned: Tuned, optimiser: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """One batch a step, another in every step."""
    for step in steps:
        tuned.begin_step(step)
        loss, penalty = loss_of(model, tokens(seed=step)), tuned.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that come to be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return found
