"""What the operators are told of a batch: whose its rows are, and which layers they change."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a batch that adapters may change. rows: (T,) int64, which of the batch's rows each is, all different;
    owners: (T,) int32, its adapter, -1: none."""

    rows: torch.Tensor
    owners: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """Layers whose outputs lie side by side in one tensor. slots: (L,) int32, of their cores; columns: (L,) int64,
    where in a row their outputs begin; widths: (L,) int32, how many there are; widest: of them."""

    slots: torch.Tensor
    columns: torch.Tensor
    widths: torch.Tensor
    widest: int

    @staticmethod
    def of(slots: list[int], columns: list[int], widths: list[int], device: torch.device) -> Layers:
        return Layers(
            torch.tensor(slots, dtype=torch.int32, device=device),
            torch.tensor(columns, dtype=torch.int64, device=device),
            torch.tensor(widths, dtype=torch.int32, device=device),
            max(widths, default=0),
        )
