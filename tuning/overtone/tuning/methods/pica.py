"""PiCa: one matrix for all layers of a kind behind each layer's own singular vectors (ICLR 2026, arXiv 2505.20211).

    delta_W = M_f P        P = Vh[:r] (r, q) of the layer's weight W = U diag(s) Vh, frozen; M_f (p, r), zero at first

The kinds are the targets. As in the authors' code, and so in the server, a layer is of the first kind whose entry is a part
of its full name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from overtone.adapters import BaseDescription
from overtone.adapters.families.pica import basis_digest
from overtone.adapters.files import PICA_LAYOUT
from overtone.adapters.projectors import Projectors
from overtone.errors import InvalidRequest
from overtone.tuning.methods.attach import Branch, describe, target_layers
from overtone.tuning.methods.budget import Budget, check_count, check_flag
from overtone.tuning.methods.spectrum import working_dtype
from overtone.tuning.methods.tuned import TunedBranches
from overtone.tuning.methods.types import Group


@dataclass(frozen=True, kw_only=True)
class PicaMethod(Budget):
    """rank: r, for every layer.

    include_basis: whether the folder brings P along. Otherwise it has P's digest, and a server that computes another P,
    because of its CPU, its number of threads or its precision, refuses the adapter. projector_folder: where P is kept, by
    the base model's fingerprint, as the server keeps it below its store in bases/; None: it is computed anew.
    """

    name: ClassVar[str] = "pica"
    rank: int = 32
    include_basis: bool = False
    projector_folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.rank, "rank")
        check_flag(self.include_basis, "include_basis")

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedPica:
        """See `Method.attach`. Takes an SVD of every adapted weight that is not kept yet; nothing is random."""
        shapes = target_layers(model, self.targets)
        base = describe(model)
        kinds = _kinds(self.targets, shapes, base)
        for name, shape in shapes.items():
            if self.rank > min(shape):
                message = f"rank is {self.rank}, but {name}, {shape[0]} x {shape[1]}, has only {min(shape)}"
                raise InvalidRequest(f"{message} singular vectors", field="rank")
        folder = self.projector_folder
        projectors = Projectors(None if folder is None else folder / base.fingerprint[:16], base)
        shared = {kind: nn.Parameter(torch.zeros(p, self.rank)) for kind, p in _outputs(kinds, shapes).items()}
        branches = {
            name: PicaBranch(shape, shared[kinds[name]], projectors.get(name, self.rank).matrix[: self.rank])
            for name, shape in shapes.items()
        }
        return TunedPica(self, model, branches, shared)


def _kinds(targets: Sequence[str], shapes: Mapping[str, tuple[int, int]], base: BaseDescription) -> dict[str, str]:
    """Layer -> kind. Raises `InvalidRequest` unless the server finds the same layers by parts of their names."""
    kinds = {}
    for name in base.modules:
        kind = next((target for target in targets if target in name), None)
        if kind is not None and name not in shapes:
            message = f"{kind} is also a part of the name {name}, which PiCa would then adapt too"
            raise InvalidRequest(message, field="targets")
        if kind is not None:
            kinds[name] = kind
    for target in targets:
        if target not in kinds.values():
            raise InvalidRequest(f"all layers called {target} belong to an earlier target", field="targets")
    return kinds


def _outputs(kinds: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Kind -> p."""
    outputs: dict[str, int] = {}
    for name, kind in kinds.items():
        p = outputs.setdefault(kind, shapes[name][0])
        if p != shapes[name][0]:
            message = f"layers of {kind} have {p} and {shapes[name][0]} outputs ({name}), but PiCa has one M for all"
            raise InvalidRequest(message, field="targets")
    return outputs


class PicaBranch(Branch):
    """m: (p, r), which all layers of a kind hold; basis: P (r, q), both float32."""

    basis: torch.Tensor

    def __init__(self, shape: tuple[int, int], m: nn.Parameter, basis: torch.Tensor) -> None:
        super().__init__(shape)
        self.m = m
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = working_dtype(x)
        y: torch.Tensor = (x.to(dtype) @ self.basis.to(dtype).T) @ self.m.to(dtype).T
        return y


class TunedPica(TunedBranches):
    """shared: kind -> M."""

    layout = PICA_LAYOUT

    def __init__(
        self,
        method: PicaMethod,
        model: nn.Module,
        branches: Mapping[str, PicaBranch],
        shared: Mapping[str, nn.Parameter],
    ) -> None:
        self._digest = basis_digest({name: branch.basis for name, branch in branches.items()}, method.rank)
        super().__init__(method, model, branches, facts={"basis_sha256": self._digest})
        self._method = method
        self._layers = dict(branches)
        self._shared = dict(shared)

    @property
    def groups(self) -> Sequence[Group]:
        return [Group("matrices", list(self._shared.values()))]

    def _contents(self) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {kind: m.data for kind, m in self._shared.items()}
        if self._method.include_basis:
            tensors |= {f"basis.{name}": branch.basis for name, branch in self._layers.items()}
        return {"peft_type": "PICA", "rank": self._method.rank, "basis_sha256": self._digest}, tensors
