"""The plans of the GPU's transforms, in plain torch, against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.kernels.gpu import reference
from overtone.kernels.gpu.plans import BLOCK, FrameName, Plan, make_plan, three_stages

SIZES = (32, 192, 576, 896, 1536, 2048, 3584, 4096, 4864, 8192, 8208, 11008, 14336, 18944)


def rows_of(frame: FrameName, size: int, k: torch.Tensor) -> torch.Tensor:
    """Rows k of the transform's matrix."""
    n = torch.arange(size)
    if frame == "dft":
        turns = 2 * math.pi * (torch.outer(k, n) % size).double() / size
        return (turns.cos() + turns.sin()) / math.sqrt(size)
    turns = math.pi * (torch.outer(k, 2 * n + 1) % (4 * size)).double() / (2 * size)
    return turns.cos() * math.sqrt(2 / size) * torch.where(k == 0, math.sqrt(0.5), 1.0)[:, None]


def plan_of(size: int, frame: FrameName, *, inverse: bool) -> Plan:
    plan = make_plan(size, torch.float64, torch.device("cpu"), inverse=inverse, frame=frame)
    assert plan is not None
    assert (plan.inner is not None) == three_stages(size)
    return plan


@pytest.mark.parametrize("frame", ["dct", "dft"])
@pytest.mark.parametrize("size", SIZES)
def test_plans(size: int, frame: FrameName) -> None:
    """Some coefficients of each transform: the first, the last, and others all over it."""
    generator = torch.Generator().manual_seed(size)
    k = torch.cat((torch.tensor([0, 1, size // 2, size - 1]), torch.randint(size, (60,), generator=generator)))
    dense, x = rows_of(frame, size, k), torch.randn(2, size, generator=generator, dtype=torch.float64)
    forward, backward = (plan_of(size, frame, inverse=inverse) for inverse in (False, True))
    assert torch.equal(forward.place(torch.arange(size)).sort().values, torch.arange(size))
    found = reference.analysis(forward, x)[:, forward.place(k)] * forward.weight(k)
    torch.testing.assert_close(found, x @ dense.T, rtol=0, atol=1e-6)
    numbers = torch.randn(2, len(k), generator=generator, dtype=torch.float64)
    block, local = backward.block_of(k)
    assert block.max() < backward.blocks
    u = torch.zeros(2, backward.blocks * BLOCK, dtype=torch.float64)
    u.index_add_(1, block * BLOCK + local, numbers * backward.weight(k))
    torch.testing.assert_close(reference.synthesis(backward, u), numbers @ dense, rtol=0, atol=1e-6)


def test_sizes_without_a_plan() -> None:
    for size in (16, 24, 100, 4100):
        assert make_plan(size, torch.float32, torch.device("cpu"), inverse=False) is None
