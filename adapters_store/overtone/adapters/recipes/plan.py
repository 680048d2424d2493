"""What becomes of the numbers of an adapter: the values of its sparse cores, all at once.

The slow twin is `overtone.adapters.families`: every number must come out the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from overtone.adapters.families.config import AdapterConfig
from overtone.adapters.families.types import ParserContext
from overtone.adapters.recipes.columns import Column, Entry

Raw = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """values[targets[i]] += stored[sources[i]] times the factors, one after another, in float64; then all times `scale`.

    sources: (m,); targets: (m,) of 0 to entries - 1, each at least once, None for 0 to m - 1; factors: numbers or (m,).
    """

    sources: NDArray[np.intp]
    targets: NDArray[np.intp] | None
    entries: int
    factors: Sequence[float | NDArray[np.float64]]
    scale: float = 1.0

    def apply(self, stored: NDArray[np.float64]) -> NDArray[np.float32]:
        """values: (entries,); not all finite if `stored` is not."""
        with np.errstate(all="ignore"):
            numbers = stored[self.sources]
            for factor in self.factors:
                numbers *= factor
            if self.targets is not None:
                numbers = np.bincount(self.targets, numbers, self.entries).astype(np.float64, copy=False)
            numbers += 0.0  # a sum that begins with 0 has no negative zero
            numbers *= self.scale
            return numbers.astype(np.float32)

    @property
    def nbytes(self) -> int:
        arrays = [self.sources, self.targets, *self.factors]
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


class Places(NamedTuple):
    """Coordinates of all modules one after another, in each sorted by (row, col) and unique. counts: of each module, int64;
    rows, cols: (n,) int32."""

    counts: NDArray[np.int64]
    rows: NDArray[np.int32]
    cols: NDArray[np.int32]

    def once(self) -> tuple[tuple[int, ...] | None, NDArray[np.int32], NDArray[np.int32]]:
        """For each module the first one with the same coordinates, None if no two have the same; then rows and cols of those
        first ones alone."""
        stops = np.cumsum(self.counts)
        starts = stops - self.counts
        if self._surely_distinct(starts, stops):
            return None, self.rows, self.cols
        pieces = [slice(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
        known: dict[tuple[bytes, bytes], int] = {}
        owners = tuple(
            known.setdefault((self.rows[piece].tobytes(), self.cols[piece].tobytes()), i)
            for i, piece in enumerate(pieces)
        )
        kept = [pieces[i] for i in known.values()]
        rows, cols = (np.concatenate([array[piece] for piece in kept]) for array in (self.rows, self.cols))
        return (None if len(kept) == len(pieces) else owners), rows, cols

    def _surely_distinct(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> bool:
        """Whether no two modules have the same first, middle and last coordinates."""
        at = np.concatenate((starts, (starts + stops) // 2, stops - 1))
        some = (self.rows[at].astype(np.int64) << 32 | self.cols[at]).reshape(3, -1)
        return len(set(zip(*some.tolist(), strict=True))) == len(starts)


class Planner(Protocol):
    """A family's share of a recipe. values: the stored numbers; nbytes: that it takes in memory."""

    @property
    def values(self) -> Column: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, weights: bytes) -> Raw:
        """All in the file that the locations depend on."""

    def plan(self, raw: Raw) -> tuple[Fold, Places] | None:
        """None if something is odd, which the slow twin may say what it is."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a recipe is made from: the first adapter of its kind, which the slow twin has admitted.

    entries: its tensors, by name without what they all begin with; modules: with tensors, in order; shapes: (p, q) of each.
    """

    config: AdapterConfig
    entries: Mapping[str, Entry]
    modules: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    context: ParserContext

    def parts(self, name: str) -> list[Entry]:
        """The tensor so called of every module. Raises KeyError if one has none."""
        return [self.entries[f"{module}.{name}"] for module in self.modules]

    def only(self, *names: str) -> bool:
        """Whether these are all tensors."""
        return len(self.entries) == len(names) * len(self.modules)
