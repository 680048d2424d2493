"""Arenas of spectral cores for the Triton kernels, and what they must add, dense in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overtone.kernels.gpu.batch import Layers, Words
from overtone.kernels.gpu.placing import spectral_core
from overtone.kernels.gpu.plans import FrameName, Plan, make_plan
from overtone.kernels.gpu.records import extent_of
from support.cores import popular_adapters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
SLOTS = 3
GAP = 16
"""Numbers between the outputs of two layers."""


@dataclass(frozen=True, slots=True)
class Entries:
    """A core in its frame's coordinates. rows, cols: (n,) int64; values: (n,) float64."""

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Adapters of two layers of one shape, slots 2 and 0, side by side in a wider output; some have no core there."""

    frame: FrameName
    shape: tuple[int, int]
    dtype: torch.dtype
    adapters: Sequence[dict[int, Entries]]

    @property
    def layers(self) -> Layers:
        p = self.shape[0]
        return Layers.of([2, 0], [0, p + GAP], [p, p], DEVICE)

    @property
    def width(self) -> int:
        return 2 * self.shape[0] + GAP

    def plan(self, *, inverse: bool) -> Plan:
        plan = make_plan(self.shape[not inverse], self.dtype, DEVICE, inverse=inverse, frame=self.frame)
        assert plan is not None
        return plan

    def arena(self) -> tuple[Words, list[int]]:
        """The arena, something else before each extent, and where each adapter's directory begins."""
        plans = self.plan(inverse=False), self.plan(inverse=True)
        parts, directories, end = [], [], 0
        for adapter in self.adapters:
            records = {
                slot: spectral_core(one.rows, one.cols, one.values, self.shape, *plans, self.dtype)
                for slot, one in adapter.items()
            }
            extent = extent_of(SLOTS, {"spectral": records})
            parts += [torch.full((8,), 0x7F7F7F7F, dtype=torch.int32), extent.words]
            directories.append(end + 8 + extent.directories["spectral"])
            end += 8 + len(extent.words)
        return Words.of(torch.cat(parts).to(DEVICE), self.dtype), directories

    def expected(self, x: torch.Tensor, y: torch.Tensor, adapters: dict[int, int]) -> torch.Tensor:
        """y with the terms of `adapters` by row, float64."""
        p, y = self.shape[0], y.double().clone()
        for row, adapter in adapters.items():
            for slot, column in ((2, 0), (0, p + GAP)):
                if adapter >= 0 and slot in self.adapters[adapter]:
                    one = self.adapters[adapter][slot]
                    y[row, column : column + p] += term(self.frame, self.shape, one, x[row].double())
        return y


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entries(frame: FrameName, shape: tuple[int, int], n: int, generator: torch.Generator) -> Entries:
    """At random, some perhaps twice; the first ones where a transform's weights are special."""
    p, q = (size if frame == "dct" else 2 * (size // 2 + 1) for size in shape)
    rows, cols = torch.randint(p, (n,), generator=generator), torch.randint(q, (n,), generator=generator)
    rows[:3], cols[:2] = 0, 0
    rows[3:4], cols[3:4] = p - 1, q - 1
    return Entries(rows, cols, torch.randn(n, generator=generator).double())


def mixed_case(shape: tuple[int, int], dtype: torch.dtype, frame: FrameName = "dct") -> Case:
    """Adapters of all sizes, one without a core in a slot, one with an empty one, one without any."""
    g = torch.Generator().manual_seed(3)
    sizes: list[dict[int, int]] = [{0: 60, 2: 200}, {2: 1}, {0: 500, 2: 0}, {}, {1: 5, 0: 40}]
    cores = [{slot: entries(frame, shape, n, g) for slot, n in one.items()} for one in sizes]
    return Case(frame, shape, dtype, cores)


def term(frame: FrameName, shape: tuple[int, int], one: Entries, x: torch.Tensor) -> torch.Tensor:
    """x: (q,) float64; returns (p,)."""
    p, q = shape
    z = _rows(frame, q, one.cols, synthesis=False) @ x
    return (one.values * z) @ _rows(frame, p, one.rows, synthesis=True)


def _rows(frame: FrameName, size: int, at: torch.Tensor, *, synthesis: bool) -> torch.Tensor:
    """Rows `at` of the frame's analysis, or columns of its synthesis."""
    n = torch.arange(size)
    if frame == "dct":
        turns = math.pi * (torch.outer(at, 2 * n + 1) % (4 * size)).double() / (2 * size)
        return turns.cos() * math.sqrt(2 / size) * torch.where(at == 0, math.sqrt(0.5), 1.0)[:, None]
    half = size // 2 + 1
    k = at % half
    turns = 2 * math.pi * (torch.outer(k, n) % size).double() / size
    rows = torch.where((at >= half)[:, None], -turns.sin(), turns.cos()) / math.sqrt(size)
    twice = synthesis & (k > 0) & (2 * k != size)
    return rows * torch.where(twice, 2.0, 1.0)[:, None]


def check_close(case: Case, found: torch.Tensor, expected: torch.Tensor, y: torch.Tensor) -> None:
    """What adapters change is right; all else is as it was, to the last bit."""
    scale = max(1.0, (expected - y.double()).abs().max().item())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-3, atol=TOLERANCE[case.dtype] * scale)
    p = case.shape[0]
    for columns in (slice(0, p), slice(p, p + GAP), slice(p + GAP, None)):
        untouched = (expected[:, columns] == y[:, columns].double()).all(1)
        assert torch.equal(found.cpu()[untouched, columns], y[untouched, columns])


def owners_of(pattern: str) -> list[int]:
    """Adapters of rows, of five; -1: none."""
    if pattern in ("distinct", "uniform", "zipf", "identical"):
        return popular_adapters(pattern, 5)
    return {"none": [-1, -1], "mixed": [2, -1, 0, 2, 4, 1], "no core": [3], "one": [0], "nothing": []}[pattern]
