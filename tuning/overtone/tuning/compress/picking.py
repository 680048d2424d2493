"""The n largest of numbers that come in pieces, exactly, in memory for a few times n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """The largest, in order: by magnitude, of equal ones the smaller place first.

    values: (n,) float64; places: (n,) int64; sizes: how many places each group has, one group after another; dropped:
    (groups,) float64, the sum of squares of what is not here.
    """

    values: torch.Tensor
    places: torch.Tensor
    sizes: tuple[int, ...]
    dropped: torch.Tensor

    @property
    def groups(self) -> torch.Tensor:
        """Which group each is of: (n,) int64."""
        return _groups(self.places, self.sizes)

    def first(self, n: int) -> Picked:
        """Only the n largest."""
        more = torch.bincount(self.groups[n:], weights=self.values[n:].square(), minlength=len(self.sizes))
        return Picked(self.values[:n], self.places[:n], self.sizes, self.dropped + more)

    def of(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, places within the group), by place."""
        start = sum(self.sizes[:group])
        mine = (self.places >= start) & (self.places < start + self.sizes[group])
        places, order = (self.places[mine] - start).sort()
        return self.values[mine][order], places


class Picker:
    """Takes numbers by growing places, of which groups (modules) have consecutive ones."""

    def __init__(self, wanted: int, sizes: Sequence[int]) -> None:
        self._wanted = wanted
        self._sizes = tuple(sizes)
        self._dropped = torch.zeros(len(sizes), dtype=torch.float64)
        self._floor = 0.0 if wanted else float("inf")
        self._values: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._held = 0

    def offer(self, values: torch.Tensor, start: int) -> None:
        """values: (k,) float64, of the places from `start` on, all of one group. Zeros are never picked."""
        magnitudes = values.abs()
        candidates = magnitudes > self._floor
        if (
            int(candidates.sum()) > 2 * self._wanted
        ):  # no more than `wanted` of one piece, and what equals the last of them
            candidates &= magnitudes >= magnitudes.topk(self._wanted).values[-1]
        group = int(_groups(torch.tensor([start]), self._sizes))
        self._dropped[group] += values.masked_fill(candidates, 0).square().sum()
        index = candidates.nonzero().flatten()
        self._values.append(values[index])
        self._places.append(index + start)
        self._held += index.numel()
        if self._held > 2 * self._wanted:
            self._prune()

    def done(self) -> Picked:
        self._prune()
        values, places = self._values[0], self._places[0]
        order = values.abs().sort(descending=True, stable=True).indices
        return Picked(values[order], places[order], self._sizes, self._dropped)

    def _prune(self) -> None:
        """Of equal ones at the edge the first stay: later ones will not get past the floor either."""
        values = torch.cat(self._values) if self._values else torch.zeros(0, dtype=torch.float64)
        places = torch.cat(self._places) if self._places else torch.zeros(0, dtype=torch.int64)
        if values.numel() > self._wanted:
            magnitudes = values.abs()
            self._floor = float(magnitudes.topk(self._wanted).values[-1])
            keep = magnitudes > self._floor
            ties = (magnitudes == self._floor).nonzero().flatten()
            keep[ties[: self._wanted - int(keep.sum())]] = True
            lost = torch.bincount(
                _groups(places[~keep], self._sizes), weights=values[~keep].square(), minlength=len(self._sizes)
            )
            self._dropped += lost
            values, places = values[keep], places[keep]
        self._values, self._places, self._held = [values], [places], values.numel()


def _groups(places: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    return torch.searchsorted(ends, places, right=True)
