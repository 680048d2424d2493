"""The Triton kernels of a spectral term against dense matrices in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels.gpu import configs, reference
from overtone.kernels.gpu.analyse import AnalyseConfig, analyse
from overtone.kernels.gpu.batch import Rows
from overtone.kernels.gpu.plans import FrameName, make_plan
from overtone.kernels.gpu.synthesise import SynthesiseConfig, add_synthesis
from support.gpu_spectral import (
    DEVICE,
    TOLERANCE,
    Case,
    Entries,
    check_close,
    entries,
    mixed_case,
    numbers,
    owners_of,
)

PATTERNS = ("distinct", "uniform", "zipf", "identical", "none", "mixed", "no core", "one", "nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_t", [1, 2])
@pytest.mark.parametrize(
    ("size", "frame"), [(64, "dct"), (192, "dft"), (576, "dct"), (896, "dft"), (1536, "dct"), (8192, "dct")]
)
def test_analysis(size: int, frame: FrameName, block_t: int, dtype: torch.dtype) -> None:
    """Rows of a wider input, in any order, some without an adapter, whose z stays as it is."""
    plan = make_plan(size, dtype, DEVICE, inverse=False, frame=frame)
    twin = make_plan(size, torch.float64, torch.device("cpu"), inverse=False, frame=frame)
    assert plan is not None
    assert twin is not None
    x = numbers(7, size + 8).to(dtype)[:, :size]
    rows, directories = torch.tensor([6, 0, 3, 1, 2]), torch.tensor([8, -1, 0, -1, -1])
    z = torch.full((5, size), 9.0, device=DEVICE)
    analyse(plan, x.to(DEVICE), Rows(rows.to(DEVICE), directories.to(DEVICE)), z, AnalyseConfig(block_t=block_t))
    expected = reference.analysis(twin, x[rows].double())
    expected[directories < 0] = 9.0
    torch.testing.assert_close(z.cpu().double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


def added(case: Case, x: torch.Tensor, y: torch.Tensor, rows: list[int], owners: list[int]) -> torch.Tensor:
    """y after both kernels, as they are configured for the shape."""
    (p, q), (words, directories) = case.shape, case.arena()
    of_rows = torch.tensor([directories[owner] if owner >= 0 else -1 for owner in owners], dtype=torch.int64)
    batch = Rows(torch.tensor(rows, dtype=torch.int64, device=DEVICE), of_rows.to(DEVICE))
    z = torch.full((len(rows), q), torch.nan, device=DEVICE)
    found = y.to(DEVICE).clone()
    analyse(case.plan(inverse=False), x.to(DEVICE), batch, z, configs.analyse_config(q, len(rows), 90))
    config = configs.synthesise_config(p, len(rows), 90)
    add_synthesis(case.plan(inverse=True), z, batch, words, case.layers, found, config)
    return found


def check(case: Case, owners: list[int]) -> None:
    rows = torch.randperm(len(owners) + 2, generator=torch.Generator().manual_seed(1))[: len(owners)].tolist()
    x = numbers(len(owners) + 2, case.shape[1], seed=1).to(case.dtype)
    y = numbers(len(owners) + 2, case.width, seed=2).to(case.dtype)
    expected = case.expected(x, y, dict(zip(rows, owners, strict=True)))
    check_close(case, added(case, x, y, rows, owners), expected, y)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_popularity(pattern: str) -> None:
    check(mixed_case((192, 576), torch.float32), owners_of(pattern))


@pytest.mark.parametrize(
    ("shape", "frame", "dtype"),
    [
        ((64, 192), "dct", torch.float16),
        ((64, 192), "dft", torch.float16),
        ((576, 192), "dct", torch.float32),
        ((576, 192), "dft", torch.float32),
        ((896, 576), "dct", torch.float32),
        ((1536, 64), "dft", torch.float16),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, int], frame: FrameName, dtype: torch.dtype) -> None:
    check(mixed_case(shape, dtype, frame), owners_of("mixed"))


@pytest.mark.parametrize(
    ("shape", "frame", "dtype"),
    [((8448, 192), "dct", torch.float32), ((64, 8192), "dft", torch.float16), ((8192, 64), "dft", torch.float32)],
    ids=str,
)
def test_long_transforms(shape: tuple[int, int], frame: FrameName, dtype: torch.dtype) -> None:
    """Of three stages, on either side."""
    check(mixed_case(shape, dtype, frame), [0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_concentrated_cores(dtype: torch.dtype) -> None:
    """All entries in one row; as many as 16 bits do not count, in a small shape."""
    g, shape = torch.Generator().manual_seed(4), (64, 192)
    one_row = Entries(
        torch.full((700,), 37), torch.randint(192, (700,), generator=g), torch.randn(700, generator=g).double()
    )
    many = entries("dct", shape, 66000, g)
    case = Case("dct", shape, dtype, [{2: one_row}, {0: one_row, 2: Entries(many.rows, many.cols, many.values / 300)}])
    x, y = numbers(2, 192, seed=1).to(dtype), numbers(2, case.width, seed=2).to(dtype)
    (words, directories), z = case.arena(), torch.empty(2, 192, device=DEVICE)
    batch = Rows(torch.arange(2, device=DEVICE), torch.tensor(directories, device=DEVICE))
    found = y.to(DEVICE).clone()
    analyse(case.plan(inverse=False), x.to(DEVICE), batch, z, AnalyseConfig())
    wide = SynthesiseConfig(block_c=16, block_j=128)
    add_synthesis(case.plan(inverse=True), z, batch, words, case.layers, found, wide)
    check_close(case, found, case.expected(x, y, {0: 0, 1: 1}), y)


def test_neighbours() -> None:
    """A row's numbers are the same to the last bit alone and among others."""
    case, owners = mixed_case((192, 576), torch.float16), [2, 0, -1, 4, 2]
    x, y = numbers(5, 576, seed=1).half(), numbers(5, case.width, seed=2).half()
    together = added(case, x, y, [0, 1, 2, 3, 4], owners)
    for row, owner in enumerate(owners):
        assert torch.equal(added(case, x, y, [row], [owner])[row], together[row])


def test_damaged_columns() -> None:
    """A column that is no place of the input is nothing, and is not read."""
    one = Entries(torch.arange(40), torch.arange(40), torch.ones(40).double())
    case = Case("dct", (64, 192), torch.float32, [{2: one}])
    (words, directories), z = case.arena(), torch.empty(1, 192, device=DEVICE)
    columns = (directories[0] + int(words.words[directories[0] + 2]) + 4 + 40) * 2
    words.shorts[columns : columns + 40] = -1
    batch = Rows(torch.tensor([0], device=DEVICE), torch.tensor(directories, device=DEVICE))
    x, y = numbers(1, 192).to(DEVICE), numbers(1, case.width).to(DEVICE)
    found = y.clone()
    analyse(case.plan(inverse=False), x, batch, z, AnalyseConfig())
    add_synthesis(case.plan(inverse=True), z, batch, words, case.layers, found, SynthesiseConfig())
    assert torch.equal(found, y)
