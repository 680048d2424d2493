"""Where a method meets the model: its layers are found, the model is frozen, and a branch is put beside each layer."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from overtone.adapters import BaseDescription
from overtone.errors import InvalidRequest
from overtone.models.fingerprint import fingerprint_of

_BLOCK = 1024


class Branch(nn.Module, ABC):
    """delta_W x of one layer. shape: (p, q)."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """delta_W x. x: (..., q) of any floating dtype; returns (..., p) in float32, for float64 in float64."""

    @torch.no_grad()
    def dense_delta(self) -> torch.Tensor:
        """delta_W (p, q) float32 on the CPU: what the branch makes of unit vectors."""
        (p, q), device = self.shape, next(self.parameters()).device
        delta = torch.empty(p, q)
        for start in range(0, q, _BLOCK):
            units = torch.zeros(min(_BLOCK, q - start), q, device=device)
            units.diagonal(start).fill_(1)
            delta[:, start : start + len(units)] = self(units).T
        return delta


class AdaptedLinear(nn.Module):
    """y = base(x) + branch(dropout(x)), the sum in the precision of base(x).

    base: nn.Linear or transformers' Conv1D, frozen; x: (..., q); y: (..., p).
    """

    def __init__(self, base: nn.Module, branch: Branch, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.branch = branch
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> torch.Tensor:
        """The base's own: models ask their layers for it."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        with torch.autocast(x.device.type, enabled=False):
            delta: torch.Tensor = self.branch(self.dropout(x))
        return y + delta.to(y.dtype)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(p, q) of a linear layer, None of any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    return None


def weight_of(layer: nn.Module) -> torch.Tensor:
    """W (p, q) of a linear layer, a view."""
    weight: torch.Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Full name -> (p, q) of the linear layers whose names are, or after a dot end in, one of `targets`.

    Raises `InvalidRequest` with the field "targets" if an entry names none, or a layer of another kind.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[int, int]] = {}
    for target in targets:
        names = [name for name in modules if name == target or name.endswith("." + target)]
        if not names:
            raise InvalidRequest(f"no layer of the model is called {target}{_hint(target, modules)}", field="targets")
        for name in names:
            shape = linear_shape(modules[name])
            if shape is None:
                kind = type(modules[name]).__name__
                raise InvalidRequest(f"{name} is of the class {kind}, not a plain linear layer", field="targets")
            found[name] = shape
    return {name: found[name] for name in modules if name in found}


def _hint(target: str, modules: Mapping[str, nn.Module]) -> str:
    known = {name.rpartition(".")[2] for name, layer in modules.items() if linear_shape(layer) is not None}
    near = difflib.get_close_matches(target, known, n=3) or sorted(known)[:8]
    return f"; there are {', '.join(near)}" if near else ""


def wrap(model: nn.Module, branches: Mapping[str, Branch], dropout: float = 0.0) -> None:
    """Freezes the model and puts each branch beside the layer with its name, on that layer's device."""
    model.requires_grad_(False)
    for name, branch in branches.items():
        base = model.get_submodule(name)
        branch.to(weight_of(base).device)
        _put(model, name, AdaptedLinear(base, branch, dropout).train(base.training))


def unwrap(model: nn.Module, names: Sequence[str]) -> None:
    """Takes back what `wrap` did, but that the model stays frozen."""
    for name in names:
        adapted = model.get_submodule(name)
        assert isinstance(adapted, AdaptedLinear)
        _put(model, name, adapted.base)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def describe(model: nn.Module, name: str = "") -> BaseDescription:
    """A model to which nothing has been attached, as the server describes it to the parsers of adapters."""
    shapes = {module: linear_shape(layer) for module, layer in model.named_modules()}
    return BaseDescription(
        name=name or type(model).__name__,
        fingerprint=fingerprint_of(model),
        modules={module: shape for module, shape in shapes.items() if shape is not None},
        weight=partial(_weight, model),
        conv1d=frozenset(module for module, layer in model.named_modules() if isinstance(layer, Conv1D)),
    )


def _weight(model: nn.Module, module: str) -> torch.Tensor:
    return weight_of(model.get_submodule(module))
