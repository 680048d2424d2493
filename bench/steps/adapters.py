"""Random adapters of a whole model, as the store would hand them to the engine, made cheaply.

A few contents are made and packed, as any adapter is; other adapters have the same numbers at other places of the device's
memory, which costs a step what different numbers would.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bench.roofline import Family

from overtone.kernels import (
    DCT,
    IDENTITY,
    PreparedLowRank,
    PreparedTerm,
    SharedMatrix,
    compress,
    projection,
    sparse_core,
)
from overtone.kernels.prepared import PreparedDense
from overtone.models.channels import AdapterDeltas
from overtone.models.device.extents import Packed, Packer

_STRENGTH = 0.1
"""Of what an adapter adds, beside its input."""


@dataclass(frozen=True, eq=False)
class Delta:
    terms: tuple[PreparedTerm, ...]


class RandomAdapters:
    """modules: (p, q) by name; device: where the numbers are."""

    def __init__(self, modules: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._projections: dict[tuple[str, int], SharedMatrix] = {}

    def make(self, family: Family, seed: int) -> AdapterDeltas:
        torch.manual_seed(1000 + seed)
        chosen = {n: s for n, s in self._modules.items() if n.rpartition(".")[2] in family.targets}
        assert chosen
        cores: dict[str, PreparedDense] = {}
        return {name: Delta((self._term(family, name, shape, cores),)) for name, shape in chosen.items()}

    def _term(self, family: Family, name: str, shape: tuple[int, int], cores: dict[str, PreparedDense]) -> PreparedTerm:
        (p, q), size = shape, family.size
        if family.kind == "spectral":
            flat = torch.randint(p * q, (min(size, p * q // 4),)).unique()
            values = torch.randn(len(flat)) * _STRENGTH * (p / size) ** 0.5
            return PreparedTerm(DCT, compress(sparse_core(flat // q, flat % q, values, shape), self._device), DCT)
        if family.kind == "pair":
            down, up = self._randn(size, q) * q**-0.5, self._randn(size, p) * _STRENGTH * size**-0.5
            return PreparedTerm(IDENTITY, PreparedLowRank(down, up), IDENTITY)
        kind = name.rpartition(".")[2]  # one core for all layers, as PiCa has it
        if kind not in cores:
            cores[kind] = PreparedDense(self._randn(p, size) * _STRENGTH * size**-0.5)
        return PreparedTerm(projection(self._projection(name, size, q)), cores[kind], IDENTITY)

    def _projection(self, name: str, size: int, q: int) -> SharedMatrix:
        key = name, size
        if key not in self._projections:
            self._projections[key] = SharedMatrix(f"{name} {size}", self._randn(size, q) * q**-0.5)
        return self._projections[key]

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device)


class PackedOnce:
    """A `Packer` that packs each of the adapters that it is given once."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._known: dict[int, tuple[AdapterDeltas, Packed | None]] = {}

    def pack(self, deltas: AdapterDeltas) -> Packed | None:
        if id(deltas) not in self._known:
            self._known[id(deltas)] = deltas, self._packer.pack(deltas)
        return self._known[id(deltas)][1]

    def again(self, deltas: AdapterDeltas) -> tuple[Packed, float]:
        """And how many seconds it takes."""
        start = time.perf_counter()
        packed = self._packer.pack(deltas)
        assert packed is not None
        return packed, time.perf_counter() - start
