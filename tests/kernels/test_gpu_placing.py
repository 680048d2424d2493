"""Cores of the DFT frame between Hartley forms, in plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.adapters.families.fourierft import real_entries
from overtone.kernels import DFT
from overtone.kernels.gpu.placing import hartley_core
from overtone.kernels.reference import frame_matrix, synthesis_matrix


def cas(size: int) -> torch.Tensor:
    turns = 2 * math.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    return (turns.cos() + turns.sin()) / math.sqrt(size)


@pytest.mark.parametrize("shape", [(16, 24), (15, 32), (2, 1)], ids=str)
def test_every_entry(shape: tuple[int, int]) -> None:
    """All pairs of coordinates at once, with random values, and one after another."""
    (p, q), (m, n) = shape, (2 * (size // 2 + 1) for size in shape)
    at = torch.arange(m * n)
    values = torch.randn(m * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    into, out = frame_matrix(DFT, q, n), synthesis_matrix(DFT, p, m)

    def check(some: torch.Tensor) -> None:
        rows, cols, numbers = hartley_core(at[some] // n, at[some] % n, values[some], shape)
        core = torch.zeros(m, n, dtype=torch.float64).index_put_((at[some] // n, at[some] % n), values[some])
        assert len(torch.unique(rows * q + cols)) == len(rows)
        hartley = torch.zeros(p, q, dtype=torch.float64).index_put_((rows, cols), numbers)
        torch.testing.assert_close(cas(p) @ hartley @ cas(q), out @ core @ into, rtol=0, atol=1e-12)

    check(at)
    for one in at[::7]:
        check(one[None])


def test_entries_of_fourierft() -> None:
    """Two for a coefficient, one where both of its frequencies have no sine."""
    g, (p, q) = torch.Generator().manual_seed(0), (64, 96)
    rows, cols = 1 + torch.randperm(31, generator=g)[:20], 49 + torch.randperm(47, generator=g)[:20]
    for r, c, count in ((rows, cols, 40), (torch.tensor([0, 32]), torch.tensor([0, 48]), 2)):
        found = real_entries(r, c, (p, q))
        values = (found.weights * torch.randn(len(r), generator=g)[found.sources]).float()
        assert len(hartley_core(found.rows, found.cols, values.double(), (p, q))[0]) == count
