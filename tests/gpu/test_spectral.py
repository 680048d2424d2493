"""The Triton kernels of a spectral term against dense matrices in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels.cores import SparseCore
from overtone.kernels.gpu.analyse import AnalyseConfig, analyse
from overtone.kernels.gpu.batch import Layers, Rows
from overtone.kernels.gpu.plans import BLOCK, Plan, make_plan, weight
from overtone.kernels.gpu.pool import placed, pool_of
from overtone.kernels.gpu.synthesise import SynthesiseConfig, add_synthesis
from overtone.kernels.reference import core_dense, dct_matrix
from support.cores import random_core

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def plan_of(size: int, dtype: torch.dtype, *, inverse: bool) -> Plan:
    plan = make_plan(size, dtype, DEVICE, inverse=inverse)
    assert plan is not None
    return plan


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_t", [1, 2])
@pytest.mark.parametrize("size", [192, 576, 896, 1536])
def test_analysis(size: int, block_t: int, dtype: torch.dtype) -> None:
    """Rows of a wider input, in any order, some not asked for."""
    x = numbers(7, size + 8).to(dtype)[:, :size]
    rows = torch.tensor([6, 0, 3])
    plan = plan_of(size, dtype, inverse=False)
    z = torch.full((3, size), torch.nan, device=DEVICE)
    analyse(plan, x.to(DEVICE), rows.to(DEVICE), z, AnalyseConfig(block_t=block_t))
    k = torch.arange(size)
    found = z.cpu().double()[:, plan.place(k)] * weight(k)
    torch.testing.assert_close(
        found, x[rows].double() @ dct_matrix(size, torch.float64).T, rtol=0, atol=4 * TOLERANCE[dtype]
    )


BATCHES = {
    "distinct": [0, 1, 2],
    "none has one": [-1, -1],
    "mixed": [2, -1, 0, 2, 1],
    "identical": [1, 1, 1],
    "one": [0],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (576, 576), (896, 192)], ids=str)
def test_terms(shape: tuple[int, int], name: str) -> None:
    check(shape, BATCHES[name], torch.float32)


def test_terms_of_half_precision() -> None:
    check((192, 576), BATCHES["mixed"], torch.float16)


def check(shape: tuple[int, int], owners: list[int], dtype: torch.dtype) -> None:
    """Two layers of two slots in one launch, side by side in a wider output; adapters of all sizes, one without any
    core, one without one in a slot; all else stays as it was, to the last bit."""
    (p, q), generator = shape, torch.Generator().manual_seed(3)
    forward, backward = plan_of(q, dtype, inverse=False), plan_of(p, dtype, inverse=True)
    cores: list[dict[int, SparseCore]] = [
        {0: random_core(shape, 300, generator), 1: random_core(shape, 1000, generator)},
        {1: random_core(shape, 1, generator)},
        {0: random_core(shape, 3000, generator), 1: random_core(shape, 0, generator)},
    ]
    on_pool = pool_of(
        [{slot: placed(core, forward, backward) for slot, core in one.items()} for one in cores], (shape, shape), DEVICE
    )
    rows = torch.randperm(len(owners) + 2, generator=generator)[: len(owners)]
    x, y = numbers(len(owners) + 2, q, seed=1).to(dtype), numbers(len(owners) + 2, 2 * p + 16, seed=2).to(dtype)
    z = torch.zeros(len(owners), q, device=DEVICE)
    batch = Rows(rows.to(DEVICE), torch.tensor(owners, dtype=torch.int32, device=DEVICE))
    layers = Layers.of([1, 0], [0, p + 16], [p, p], DEVICE)
    found = y.to(DEVICE).clone()
    analyse(forward, x.to(DEVICE), batch.rows, z, AnalyseConfig())
    add_synthesis(backward, z, batch, on_pool, layers, found, SynthesiseConfig(block_c=2 * BLOCK))
    expected, before, after = y.double(), dct_matrix(q, torch.float64), dct_matrix(p, torch.float64).T
    for row, owner in zip(rows.tolist(), owners, strict=True):
        for slot, column in ((1, 0), (0, p + 16)):
            if owner >= 0 and slot in cores[owner]:
                delta = after @ core_dense(cores[owner][slot]).double() @ before
                expected[row, column : column + p] += delta @ x[row].double()
    scale = max(1.0, (expected - y.double()).abs().max().item())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-3, atol=TOLERANCE[dtype] * scale)
    untouched = (expected == y.double()).all(1)
    assert torch.equal(found.cpu()[untouched], y[untouched])
    assert torch.equal(found.cpu()[:, p : p + 16], y[:, p : p + 16])
