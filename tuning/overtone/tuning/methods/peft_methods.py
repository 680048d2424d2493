"""LoRA and FourierFT by PEFT itself (0.21), behind the interface of the other methods."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from overtone.adapters.failures import operation
from overtone.errors import InvalidRequest
from overtone.models.fingerprint import fingerprint_of
from overtone.tuning.methods.attach import target_layers
from overtone.tuning.methods.budget import (
    Budget,
    check_choice,
    check_count,
    check_dropout,
    check_flag,
    check_nonzero,
    check_number,
)
from overtone.tuning.methods.loca import check_room
from overtone.tuning.methods.selection import LowRank
from overtone.tuning.methods.state import packed, restore
from overtone.tuning.methods.types import Group

_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraMethod(Budget):
    """delta_W = s B A (Hu et al., ICLR 2022). A: (r, q), B: (p, r), 0 at first; s = alpha / r, rslora: alpha / sqrt(r)."""

    name: ClassVar[str] = "lora"
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")
        check_number(self.alpha, "alpha", positive=True)
        check_flag(self.rslora, "rslora")
        check_dropout(self.dropout)

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedByPeft:
        """See `Method.attach`."""
        target_layers(model, self.targets)
        settings = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
        }
        return TunedByPeft(self, model, _attach(model, "LoraConfig", settings, self.targets, seed))


@dataclass(frozen=True, kw_only=True)
class FourierftMethod(Budget):
    """delta_W = scale Re ifft2(S) with n coefficients (ICML 2024, arXiv 2405.03003) at locations from location_seed.

    init: "zero" or "normal", N(0, 1) as the authors have it. PEFT builds delta_W, (p, q), anew in every pass.
    """

    name: ClassVar[str] = "fourierft"
    n: int = 1000
    scale: float = 150.0
    init: str = "zero"
    location_seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.n, "n")
        check_nonzero(self.scale, "scale")
        check_choice(self.init, "init", ("zero", "normal"))
        check_count(self.location_seed, "location_seed", least=0)

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedByPeft:
        """See `Method.attach`."""
        check_room(self.n, target_layers(model, self.targets))
        settings = {
            "n_frequency": self.n,
            "scaling": self.scale,
            "init_weights": self.init == "zero",
            "random_loc_seed": self.location_seed,
        }
        return TunedByPeft(self, model, _attach(model, "FourierFTConfig", settings, self.targets, seed))


def _attach(
    model: nn.Module, kind: str, settings: Mapping[str, object], targets: Sequence[str], seed: int
) -> _Attached:
    """kind: the configuration's class in PEFT."""
    import peft

    base = fingerprint_of(model)
    generates = hasattr(model, "prepare_inputs_for_generation")
    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = "CAUSAL_LM" if generates else None
        config = getattr(peft, kind)(target_modules=list(targets), task_type=task, **settings)
        adapted = peft.get_peft_model(model, config).train(model.training)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT leaves some in the base model's precision
    return _Attached(adapted, base)


@dataclass(frozen=True)
class _Attached:
    """peft: a PeftModel, whose layers are in the model itself; base: the fingerprint."""

    peft: Any
    base: str


class TunedByPeft:
    def __init__(self, budget: Budget, model: nn.Module, attached: _Attached) -> None:
        self._settings = {**budget.settings(), "base": attached.base}
        self._peft = attached.peft
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = {name.replace(f".{_ADAPTER}", ""): parameter for name, parameter in parameters.items()}
        self._layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
        }

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def groups(self) -> Sequence[Group]:
        return [Group("adapter", list(self._parameters.values()))]

    def begin_step(self, step: int) -> None:
        """Everything learns in every step."""

    def penalty(self) -> torch.Tensor | None:
        return None

    def state(self) -> dict[str, torch.Tensor]:
        return packed(self._settings, self._parameters)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        restore(self._settings, self._parameters, state)

    def factors(self) -> dict[str, LowRank]:
        """Full name of a layer -> delta_W as the product that it is. Raises `InvalidRequest` unless this is LoRA."""
        if self._settings["method"] != LoraMethod.name:
            raise InvalidRequest(f"{self._settings['method']} has no factors", field="method")
        return {
            name: LowRank(
                layer.lora_A[_ADAPTER].weight.detach().clone(),
                layer.lora_B[_ADAPTER].weight.detach().clone(),
                layer.scaling[_ADAPTER],
            )
            for name, layer in self._layers.items()
        }

    @torch.no_grad()
    def deltas(self) -> dict[str, torch.Tensor]:
        """Of FourierFT as PEFT builds it, which for either kind of linear layer is (p, q)."""
        if self._settings["method"] == LoraMethod.name:
            return {name: (f.scale * f.b @ f.a).cpu() for name, f in self.factors().items()}
        return {name: layer.get_delta_weight(_ADAPTER).float().cpu() for name, layer in self._layers.items()}

    def detach(self) -> None:
        """The model as it was before, but that it stays frozen. `save` comes before, or there is nothing to save."""
        self._peft.unload()

    def save(self, folder: Path, base_name: str) -> None:
        """By PEFT's own save_pretrained. Raises `StoreFailed` if the disk refuses."""
        self._peft.peft_config[_ADAPTER].base_model_name_or_path = base_name
        with _quietly(), operation("write the adapter's folder"):
            # "auto" would ask the hub whether the vocabulary has grown.
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT warns of what it does on purpose, such as turning a Conv1D's weight round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
