"""LoCA: DCT coefficients whose locations are learned as well (Du et al., ICLR 2025, arXiv 2502.06820).

    delta_W = alpha C_p^T S C_q        S[l1_i, l2_i] += a_i        l = round(clamp(t, 0, 0.999) (N - 1))

a starts at zero, t uniform in [0, 1]. Coefficients and locations learn in turns: in step 0 the coefficients, then for
B_s steps ten steps coefficients and twenty steps locations, from then on only the coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from overtone.adapters.families.tensors import PREFIX
from overtone.errors import InvalidRequest
from overtone.tuning.methods.attach import Branch, target_layers
from overtone.tuning.methods.budget import (
    Budget,
    check_count,
    check_dropout,
    check_flag,
    check_nonzero,
    check_number,
)
from overtone.tuning.methods.spectrum import Plane, decode, spectral_product
from overtone.tuning.methods.transforms import Transforms
from overtone.tuning.methods.tuned import TunedBranches
from overtone.tuning.methods.types import Group

_CYCLE, _COEFFICIENT_STEPS = 30, 10
"""B_a + B_l and B_a of the authors."""


@dataclass(frozen=True, kw_only=True)
class LocaMethod(Budget):
    """n: coefficients in each layer; scale: alpha; location_steps: B_s, None: a tenth of all steps; location_lr: the
    locations' own learning rate. Without learn_locations they stay where the seed puts them."""

    name: ClassVar[str] = "loca"
    n: int = 1000
    scale: float = 1.0
    learn_locations: bool = True
    location_steps: int | None = None
    location_lr: float = 1e-4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.n, "n")
        check_nonzero(self.scale, "scale")
        check_flag(self.learn_locations, "learn_locations")
        if self.location_steps is not None:
            check_count(self.location_steps, "location_steps", least=0)
        check_number(self.location_lr, "location_lr", positive=True)
        check_dropout(self.dropout)

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedLoca:
        """See `Method.attach`. The locations are drawn on the CPU, layer by layer in the model's order."""
        shapes = target_layers(model, self.targets)
        check_room(self.n, shapes)
        generator, transforms = torch.Generator().manual_seed(seed), Transforms()
        branches = {
            name: LocaBranch(torch.rand(2, self.n, generator=generator), Plane(shape, self.scale, transforms))
            for name, shape in shapes.items()
        }
        steps = total_steps // 10 if self.location_steps is None else self.location_steps
        return TunedLoca(self, model, branches, steps if self.learn_locations else 0)


def check_room(n: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises `InvalidRequest` for the first layer that has fewer than n weights."""
    small = next((name for name, (p, q) in shapes.items() if n > p * q), None)
    if small is not None:
        p, q = shapes[small]
        raise InvalidRequest(f"n is {n}, but {small} has only {p} x {q} weights", field="n")


def coefficients_learn(step: int, location_steps: int) -> bool:
    """Whether coefficients learn in this step; if not, locations do."""
    return step == 0 or step >= location_steps or step % _CYCLE < _COEFFICIENT_STEPS


class LocaBranch(Branch):
    """locations: t, (2, n) float32."""

    def __init__(self, locations: torch.Tensor, plane: Plane) -> None:
        super().__init__(plane.shape)
        self._plane = plane
        self.values = nn.Parameter(torch.zeros(locations.shape[1]))
        self.locations = nn.Parameter(locations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spectral_product(
            x, self.values, decode(self.locations, self.shape), self._plane, locations=self.locations
        )


class TunedLoca(TunedBranches):
    """location_steps: B_s; 0: the locations are fixed."""

    def __init__(
        self, method: LocaMethod, model: nn.Module, branches: Mapping[str, LocaBranch], location_steps: int
    ) -> None:
        super().__init__(method, model, branches, dropout=method.dropout, facts={"location_steps": location_steps})
        self._method = method
        self._values = [branch.values for branch in branches.values()]
        self._locations = [branch.locations for branch in branches.values()]
        self.location_steps = location_steps
        # Shorter schedules end before the first turn of the locations.
        self._learns_locations = location_steps > _COEFFICIENT_STEPS
        _let_learn(self._locations, self._learns_locations)

    @property
    def groups(self) -> Sequence[Group]:
        """Weight decay would draw locations to the lowest frequencies, so they have none."""
        coefficients = Group("coefficients", self._values)
        if not self._learns_locations:
            return [coefficients]
        return [coefficients, Group("locations", self._locations, lr=self._method.location_lr, weight_decay=0.0)]

    def begin_step(self, step: int) -> None:
        """What does not learn has no gradient at all, so that Adam leaves it and its moments alone."""
        coefficients = coefficients_learn(step, self.location_steps)
        _let_learn(self._values, coefficients)
        _let_learn(self._locations, not coefficients)

    def _contents(self) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        """Locations that have left [0, 1] are stored at its ends, which decode to the same frequencies."""
        tensors: dict[str, torch.Tensor] = {}
        for name, values, locations in zip(self._branches, self._values, self._locations, strict=True):
            tensors[f"{PREFIX}{name}.spectrum"] = values
            tensors[f"{PREFIX}{name}.spectrum_indices"] = locations.clamp(0, 1)
        config: dict[str, object] = {
            "peft_type": "LOCA",
            "n_frequency": self._method.n,
            "scale": self._method.scale,
            "learn_location_iter": self.location_steps,
            "loca_dropout": self._method.dropout,
        }
        return config, tensors


def _let_learn(parameters: Sequence[nn.Parameter], learns: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None
