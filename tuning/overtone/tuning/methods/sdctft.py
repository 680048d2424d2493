"""sDCTFT, also MaCP: DCT coefficients at places chosen once (Shen et al., arXiv 2410.09103; ACL 2025, arXiv 2505.23870).

    delta_W = alpha C_p^T S C_q        S[k1_i, k2_i] = s_i        C_N: orthonormal DCT-II

The authors' transform is not normalised: their alpha is ours times 2 sqrt(p q), the lowest frequencies left aside. Their
code starts s at random, so that delta_W is not zero at first; here it starts at zero unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from overtone.adapters.families.sdctft import ORTHONORMAL
from overtone.adapters.families.tensors import PREFIX
from overtone.errors import InvalidRequest
from overtone.tuning.methods.attach import Branch, target_layers, weight_of
from overtone.tuning.methods.budget import Budget, check_choice, check_count, check_fraction, check_nonzero
from overtone.tuning.methods.loca import check_room
from overtone.tuning.methods.selection import LIMITS, Matrix, banded_places
from overtone.tuning.methods.spectrum import Plane, spectral_product
from overtone.tuning.methods.transforms import Transforms
from overtone.tuning.methods.tuned import TunedBranches
from overtone.tuning.methods.types import Group


@dataclass(frozen=True, kw_only=True)
class SdctftMethod(Budget):
    """n: coefficients in each layer; scale: alpha; energy_ratio: delta; band_limit: the reading of d_max, see `selection`.

    init: "zero" or "normal", N(0, 1). changes: full name of every adapted layer -> a change of its weight, of a short LoRA
    run for instance, from whose spectrum the places are chosen, as the paper's abstract has it; None: from the base
    weight's, as its method section has it.
    """

    name: ClassVar[str] = "sdctft"
    n: int = 1000
    scale: float = 1.0
    energy_ratio: float = 0.7
    band_limit: str = "full"
    init: str = "zero"
    changes: Mapping[str, Matrix] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.n, "n")
        check_nonzero(self.scale, "scale")
        check_fraction(self.energy_ratio, "energy_ratio")
        check_choice(self.band_limit, "band_limit", LIMITS)
        check_choice(self.init, "init", ("zero", "normal"))

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedSdctft:
        """See `Method.attach`. What is random is drawn on the CPU, layer by layer in the model's order."""
        shapes = target_layers(model, self.targets)
        check_room(self.n, shapes)
        generator, transforms = torch.Generator().manual_seed(seed), Transforms()
        branches: dict[str, SdctftBranch] = {}
        for name, shape in shapes.items():
            places = banded_places(
                self._matrix(model, name, shape),
                self.n,
                energy_ratio=self.energy_ratio,
                band_limit=self.band_limit,
                generator=generator,
                transforms=transforms,
            )
            normal = self.init == "normal"
            values = torch.randn(self.n, generator=generator) if normal else torch.zeros(self.n)
            branches[name] = SdctftBranch(places, values, Plane(shape, self.scale, transforms))
        return TunedSdctft(self, model, branches)

    def _matrix(self, model: nn.Module, name: str, shape: tuple[int, int]) -> Matrix:
        if self.changes is None:
            return weight_of(model.get_submodule(name))
        if name not in self.changes:
            raise InvalidRequest(f"changes has none of {name}", field="changes")
        found = self.changes[name]
        if tuple(found.shape) != shape:
            message = f"changes has one of {tuple(found.shape)} for {name}, which is {shape}"
            raise InvalidRequest(message, field="changes")
        return found


class SdctftBranch(Branch):
    """places: (2, n) int64; values: s, (n,) float32."""

    places: torch.Tensor

    def __init__(self, places: torch.Tensor, values: torch.Tensor, plane: Plane) -> None:
        super().__init__(plane.shape)
        self._plane = plane
        self.values = nn.Parameter(values)
        self.register_buffer("places", places)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spectral_product(x, self.values, self.places, self._plane)


class TunedSdctft(TunedBranches):
    def __init__(self, method: SdctftMethod, model: nn.Module, branches: Mapping[str, SdctftBranch]) -> None:
        super().__init__(method, model, branches)
        self._method = method
        self._spectra = dict(branches)

    @property
    def groups(self) -> Sequence[Group]:
        return [Group("coefficients", [branch.values for branch in self._spectra.values()])]

    def _contents(self) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        for name, branch in self._spectra.items():
            tensors[f"{PREFIX}{name}.spectrum"] = branch.values
            tensors[f"{PREFIX}{name}.indices"] = branch.places.to(torch.int32)
        config: dict[str, object] = {
            "peft_type": "SDCTFT",
            "n_frequency": self._method.n,
            "scale": self._method.scale,
            "transform": ORTHONORMAL,
            "energy_ratio": self._method.energy_ratio,
        }
        return config, tensors
