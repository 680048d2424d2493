"""What the operators are told of a batch: whose its rows are, where their adapters lie, and which layers they change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TILE = 16
"""Rows of one adapter that the operators of prompts take together."""


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """The arena's memory, as each kernel reads it: one storage, four types. numbers: of pairs, in the operands' dtype."""

    words: torch.Tensor
    numbers: torch.Tensor

    @staticmethod
    def of(words: torch.Tensor, dtype: torch.dtype) -> Words:
        """words: (n,) int32; dtype: of the operands."""
        return Words(words, words.view(dtype))

    @property
    def shorts(self) -> torch.Tensor:
        return self.words.view(torch.int16)

    @property
    def octets(self) -> torch.Tensor:
        return self.words.view(torch.uint8)

    @property
    def values(self) -> torch.Tensor:
        """Of spectral cores: float32 beside float32 operands, else float16."""
        return self.words.view(self.value_dtype)

    @property
    def value_dtype(self) -> torch.dtype:
        return torch.float32 if self.numbers.dtype is torch.float32 else torch.float16


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a batch that adapters may change. rows: (T,) int64, which of the batch's rows each is, all different;
    directories: (T,) int64, the arena's word where the directory of its adapter begins (`overtone.kernels.gpu.records`),
    -1: none."""

    rows: torch.Tensor
    directories: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows of prompts, sorted by adapter. rows: (tiles, TILE) int64, which of the batch's rows, -1 where a tile is short;
    directories: (tiles,) int64, see `Rows`."""

    rows: torch.Tensor
    directories: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """Layers whose outputs lie side by side in one tensor. slots: (L,) int32, of their records; columns: (L,) int64,
    where in a row their outputs begin; widths: (L,) int32, how many there are; widest: of them; step: a power of two up
    to 16 that divides all columns and widths, for wide loads."""

    slots: torch.Tensor
    columns: torch.Tensor
    widths: torch.Tensor
    widest: int
    step: int = 1

    @staticmethod
    def of(slots: list[int], columns: list[int], widths: list[int], device: torch.device) -> Layers:
        return Layers(
            torch.tensor(slots, dtype=torch.int32, device=device),
            torch.tensor(columns, dtype=torch.int64, device=device),
            torch.tensor(widths, dtype=torch.int32, device=device),
            max(widths, default=0),
            math.gcd(16, *columns, *widths),
        )
