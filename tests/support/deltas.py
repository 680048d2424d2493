"""Random adapters in the form that a model takes, with their dense float64 deltas by the definition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from overtone.kernels import DCT, Delta, Frame, PreparedCore, Term, prepare, reference
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

    deltas: dict[str, Prepared]
    dense: dict[str, torch.Tensor]


def random_adapter(
    modules: Mapping[str, tuple[int, int]], names: Iterable[str], *, nnz: int = 40, seed: int = 0
) -> RandomAdapter:
    """A delta with `nnz` DCT coefficients (more or fewer by module) on each of `names`, as large as the weights are."""
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Prepared] = {}
    dense: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        core = random_core(modules[name], nnz + i % 3, generator)
        deltas[name] = Prepared((PreparedTerm(DCT, prepare(core), DCT),))
        dense[name] = reference.dense_delta(Delta((Term(DCT, core, DCT),), modules[name]))
    return RandomAdapter(deltas, dense)


def merge(model: Any, adapter: RandomAdapter | None) -> Any:
    """Adds the adapter's dense deltas to `model`'s weights, in place; returns `model`."""
    for name, delta in adapter.dense.items() if adapter else ():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_((weight.double() + delta).to(weight.dtype))
    return model
