"""Random adapters in the form that a model takes, with their dense float64 deltas by the definition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from overtone.adapters.packing import pack_deltas
from overtone.kernels import DCT, CsrCore, Delta, Frame, PackedDeltas, PreparedCore, Term, prepare, reference
from overtone.models.channels import AdapterDeltas
from support.cores import random_core


@dataclass(frozen=True, slots=True)
class PreparedTerm:
    analysis: Frame
    core: PreparedCore
    synthesis: Frame
    gain: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    terms: tuple[PreparedTerm, ...]


@dataclass(frozen=True, slots=True)
class RandomAdapter:
    """deltas: what a request carries; dense: module -> delta_W (p, q) float64."""

    deltas: AdapterDeltas
    dense: dict[str, torch.Tensor]


def random_adapter(
    modules: Mapping[str, tuple[int, int]],
    names: Iterable[str],
    *,
    nnz: int = 40,
    seed: int = 0,
    packed: bool = False,
) -> RandomAdapter:
    """A delta with `nnz` DCT coefficients (more or fewer by module) on each of `names`, as large as the weights are."""
    generator = torch.Generator().manual_seed(seed)
    cores = {name: random_core(modules[name], nnz + i % 3, generator) for i, name in enumerate(names)}
    deltas = {name: Delta((Term(DCT, core, DCT),), modules[name]) for name, core in cores.items()}
    dense = {name: reference.dense_delta(delta) for name, delta in deltas.items()}
    if packed and deltas:
        together = pack_deltas(deltas)
        assert together is not None
        return RandomAdapter(together, dense)
    return RandomAdapter(
        {name: Prepared((PreparedTerm(DCT, prepare(core), DCT),)) for name, core in cores.items()}, dense
    )


def numbers_of(deltas: AdapterDeltas) -> torch.Tensor:
    """What the adapter itself holds of its first module's values, beside which there are at most views."""
    if isinstance(deltas, PackedDeltas):
        return deltas.numbers
    core = next(iter(deltas.values())).terms[0].core
    assert isinstance(core, CsrCore)
    return core.values


def merge(model: Any, adapter: RandomAdapter | None) -> Any:
    """Adds the adapter's dense deltas to `model`'s weights, in place; returns `model`."""
    for name, delta in adapter.dense.items() if adapter else ():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_((weight.double() + delta).to(weight.dtype))
    return model
