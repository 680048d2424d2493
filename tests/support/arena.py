"""An arena of a few random adapters, as the kernels of low-rank records read it, with the matrices that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from overtone.kernels.gpu.batch import TILE, Words
from overtone.kernels.gpu.records import ALIGNMENT, Extent, extent_of


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """directories: (adapters,) int64."""

    words: Words
    directories: torch.Tensor

    def of(self, owners: Sequence[int]) -> torch.Tensor:
        """By row or tile; -1: none."""
        return torch.tensor([-1 if o < 0 else int(self.directories[o]) for o in owners], dtype=torch.int64)


def arena_of(
    adapters: Sequence[Mapping[int, torch.Tensor]], slots: int, kind: str, dtype: torch.dtype, device: torch.device
) -> Arena:
    """adapters: records by slot. Extents with gaps between them, in which there is nonsense."""
    extents = [extent_of(slots, {"other": {}, kind: records}) for records in adapters]
    words, directories = placed(extents, kind)
    return Arena(Words.of(words.to(device), dtype), directories)


def placed(extents: Sequence[Extent], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The arena's words, and where in them the directory of `kind` of each extent begins."""
    gap = torch.full((3 * ALIGNMENT,), -1, dtype=torch.int32)  # NaN as a number of any kind
    parts, begins, end = [gap], [], len(gap)
    for extent in extents:
        begins.append(end + extent.directories[kind])
        parts += [extent.words, gap]
        end += len(extent.words) + len(gap)
    return torch.cat(parts), torch.tensor(begins, dtype=torch.int64)


def tiles_of(owners: Sequence[int], rows: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """Rows sorted by owner, in tiles; the owner of each tile, and (tiles, TILE) int64 rows, -1 where a tile is short."""
    found: list[int] = []
    tiles: list[list[int]] = []
    for owner in sorted(set(owners)):
        mine = [row for row, one in zip(rows, owners, strict=True) if one == owner]
        for begin in range(0, len(mine), TILE):
            part = mine[begin : begin + TILE]
            found.append(owner)
            tiles.append(part + [-1] * (TILE - len(part)))
    return found, torch.tensor(tiles, dtype=torch.int64).view(-1, TILE)
