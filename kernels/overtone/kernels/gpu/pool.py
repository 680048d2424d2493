"""The sparse cores of many adapters in one piece of device memory, as the kernels read them.

A core is its rows' beginnings, its columns and its values, one after another, each core as long as it is: nothing is
padded. Rows and columns are places of the transforms (`overtone.kernels.gpu.plans`), values have the transforms'
weights multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.kernels.cores import SparseCore
from overtone.kernels.gpu.plans import Plan, weight
from overtone.kernels.sparse import CsrPattern, csr_pattern


@dataclass(frozen=True, slots=True, eq=False)
class PlacedCore:
    """One core in the order of its places. values: (n,) float32."""

    pattern: CsrPattern
    values: torch.Tensor


def placed(core: SparseCore, forward: Plan, inverse: Plan) -> PlacedCore:
    """forward: of q numbers, inverse: of p."""
    p, q = core.shape
    assert (inverse.size, forward.size) == (p, q)
    rows, cols = core.rows.long(), core.cols.long()
    values = core.values.double() * weight(rows) * weight(cols)
    at = inverse.place(rows) * q + forward.place(cols)
    order = at.argsort()
    return PlacedCore(csr_pattern((at[order] // q).int(), (at[order] % q).int(), core.shape), values[order].float())


@dataclass(frozen=True, slots=True, eq=False)
class CorePool:
    """starts: int32, cols: int16 where all fit, else int32; values: float32; each one run. table: (adapters, slots, 2)
    int64, where a core's starts begin and where its entries do, -1: none."""

    starts: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor


def pool_of(
    adapters: list[dict[int, PlacedCore]], shapes: tuple[tuple[int, int], ...], device: torch.device
) -> CorePool:
    """adapters: cores by slot; shapes: by slot."""
    table = torch.full((len(adapters), len(shapes), 2), -1, dtype=torch.int64)
    cores: list[PlacedCore] = []
    starts = entries = 0
    for adapter, by_slot in enumerate(adapters):
        for slot, core in by_slot.items():
            assert core.pattern.shape == shapes[slot]
            table[adapter, slot] = torch.tensor([starts, entries])
            cores.append(core)
            starts, entries = starts + len(core.pattern.pointers), entries + len(core.values)
    kind = torch.int16 if all(q < 2**15 for _, q in shapes) else torch.int32
    return CorePool(
        _joined([core.pattern.pointers for core in cores], torch.int32).to(device),
        _joined([core.pattern.cols for core in cores], kind).to(device),
        _joined([core.values for core in cores], torch.float32).to(device),
        table.to(device),
    )


def _joined(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)
