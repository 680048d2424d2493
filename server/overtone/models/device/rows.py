"""Which rows of a pass on the device have which adapter: decoded tokens first, then prompts in tiles of one adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from overtone.kernels.gpu.batch import TILE, Rows, Tiles
from overtone.models.device.extents import Use
from overtone.models.device.pool import OnDevice


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one prompt. None: the base model's."""

    tokens: int
    adapter: OnDevice | None


@dataclass(frozen=True, slots=True, eq=False)
class KindRows:
    """The rows of a pass, as operators of one kind of record see them. None: there are none."""

    decoded: Rows | None
    prompts: Tiles | None

    @staticmethod
    def decoding(rows: torch.Tensor, directories: torch.Tensor) -> KindRows:
        """All rows are decoded tokens; directories: (T,) int64, data of the pass."""
        return KindRows(Rows(rows, directories), None)


def uses_of(adapters: Iterable[OnDevice | None]) -> frozenset[Use]:
    """What any of them changes, and how."""
    distinct = {one.uses for one in adapters if one is not None}
    # Mostly they agree, and then in one object (`Packer`), whose hash is known: this is asked at every step.
    return next(iter(distinct)) if len(distinct) == 1 else frozenset(chain.from_iterable(distinct))


def kinds_of(uses: Iterable[Use]) -> Mapping[str, Mapping[str, int]]:
    """By kind, by module, the largest rank."""
    kinds: dict[str, dict[str, int]] = {}
    for use in sorted(uses, key=lambda one: (one.kind, one.module)):
        modules = kinds.setdefault(use.kind, {})
        modules[use.module] = max(modules.get(use.module, 0), use.rank)
    return kinds


def directories(decoded: Sequence[OnDevice | None], kind: str) -> list[int]:
    return [-1 if one is None else one.directory(kind) for one in decoded]


def kind_rows(decoded: Sequence[OnDevice | None], prompts: Sequence[Run], kind: str, device: torch.device) -> KindRows:
    """Rows [0, len(decoded)) are decoded tokens, the prompts' follow."""
    rows = None
    begins = directories(decoded, kind)
    if any(begin >= 0 for begin in begins):
        rows = Rows(torch.arange(len(begins), device=device), torch.tensor(begins, dtype=torch.int64, device=device))
    return KindRows(rows, _tiles(prompts, kind, len(decoded), device))


def _tiles(prompts: Sequence[Run], kind: str, start: int, device: torch.device) -> Tiles | None:
    of_adapter: dict[int, list[int]] = {}  # rows by the word where their adapter's directory begins
    for run in prompts:
        begin = -1 if run.adapter is None else run.adapter.directory(kind)
        if begin >= 0:
            of_adapter.setdefault(begin, []).extend(range(start, start + run.tokens))
        start += run.tokens
    if not of_adapter:
        return None
    tiles, begins = [], []
    for begin, rows in of_adapter.items():
        for first in range(0, len(rows), TILE):
            tile = rows[first : first + TILE]
            tiles.append(tile + [-1] * (TILE - len(tile)))
            begins.append(begin)
    return Tiles(
        torch.tensor(tiles, dtype=torch.int64, device=device), torch.tensor(begins, dtype=torch.int64, device=device)
    )
