"""What the benchmarked operators have in common: where they run, what is asked of them, what a trial of one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from bench.facts import capability
from bench.roofline import Work
from bench.timing import MOST_CALLS, Run

from overtone.kernels.gpu.batch import Words
from overtone.kernels.gpu.records import aligned, extent_of

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""How large an operator's relative error may be (L2 norms): a few roundings of the operands."""
_CONTENTS = 16
"""Different adapters; beyond, the same numbers at other places of the memory."""
_MANY = 256
"""Adapters that Zipf's law is over."""


@dataclass(frozen=True)
class Place:
    """Where it runs. cold_bytes: what a round of calls has to touch, so that the inputs of each come from memory."""

    device: torch.device
    dtype: torch.dtype
    cold_bytes: int = 0
    most_sets: int = MOST_CALLS

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> Place:
        if device.type != "cuda":
            return Place(device, dtype, most_sets=2)
        return Place(device, dtype, 2 * torch.cuda.get_device_properties(device).L2_cache_size)

    @property
    def capability(self) -> int:
        return capability(self.device)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def value_dtype(self) -> torch.dtype:
        """Of spectral cores."""
        return torch.float32 if self.dtype is torch.float32 else torch.float16

    def sets(self, footprint: float) -> int:
        """How many sets of inputs there are, of so many bytes each."""
        return max(1 if self.cold_bytes == 0 else 2, min(self.most_sets, math.ceil(self.cold_bytes / footprint)))

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Cell:
    """One measurement. q -> widths: of the layers; rows: tokens of the step, or of a prompt; popularity: of the adapters
    among them; size: coefficients of a layer, rank, or keys of a past; adapters: of a prompt's tokens."""

    operator: str
    q: int
    widths: tuple[int, ...]
    rows: int
    size: int = 0
    popularity: str = "distinct"
    adapters: int = 1

    @property
    def shape(self) -> str:
        return f"{self.q} -> {' + '.join(map(str, self.widths))}" if self.widths else str(self.q)

    def row(self) -> dict[str, object]:
        return {
            "operator": self.operator, "shape": self.shape, "q": self.q, "widths": list(self.widths), "rows": self.rows,
            "size": self.size, "popularity": self.popularity, "adapters": self.adapters,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trial:
    """One operator on one cell. error: relative, of a fresh run beside float64; work: what it cannot do without;
    reference: plain torch; footprint: bytes that one call touches."""

    ours: Run
    error: Callable[[], float]
    work: Work
    footprint: float
    reference: Run | None = None


@dataclass(frozen=True)
class Operator:
    """How the registry knows one. cells: in order of importance; checks: small ones for every machine; lora: whether it is
    measured beside low-rank pairs of rank 16 on the same layers."""

    name: str
    trial: Callable[[Cell, Place], Trial]
    cells: Sequence[Cell]
    checks: Sequence[Cell]
    lora: bool = False


def owners(cell: Cell, sets: int) -> tuple[torch.Tensor, int]:
    """(sets, rows) which adapter each row of each set has, and how many adapters there are."""
    if cell.popularity == "identical":
        first = torch.zeros(cell.rows, dtype=torch.int64)
    elif cell.popularity == "zipf":
        generator = torch.Generator().manual_seed(cell.rows)
        weights = 1 / torch.arange(1, _MANY + 1).double()
        drawn = torch.multinomial(weights, cell.rows, replacement=True, generator=generator)
        first = drawn.unique(return_inverse=True)[1]
    else:
        assert cell.popularity == "distinct"
        first = torch.arange(cell.rows)
    many = int(first.max()) + 1
    return first + torch.arange(sets)[:, None] * many, many * sets


def distinct(cell: Cell) -> int:
    return owners(cell, 1)[1]


Kinds = Mapping[str, Mapping[int, torch.Tensor]]


class Bank:
    """Adapters in device memory, `adapters` of them: the extents of `contents`, again and again.

    contents: records by slot, by kind, all of the same kinds.
    """

    def __init__(self, contents: Sequence[Kinds], slots: int, adapters: int, place: Place) -> None:
        extents = [extent_of(slots, kinds) for kinds in contents]
        self._length = aligned(max(len(one.words) for one in extents))
        self._begins = extents[0].directories
        assert all(one.directories == self._begins for one in extents)
        block = torch.zeros(len(extents), self._length, dtype=torch.int32)
        for row, one in zip(block, extents, strict=True):
            row[: len(one.words)] = one.words
        copies = -(-adapters // len(extents))
        self._contents = len(extents)
        self._device = place.device
        self.words = Words.of(block.to(place.device).repeat(copies, 1).flatten(), place.dtype)

    def directories(self, kind: str, which: torch.Tensor) -> torch.Tensor:
        return (which * self._length + self._begins[kind]).to(self._device)

    def content(self, which: torch.Tensor) -> torch.Tensor:
        """Whose numbers each adapter has."""
        return which % self._contents


def contents(adapters: int) -> int:
    return min(_CONTENTS, adapters)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; NaN never passes."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
