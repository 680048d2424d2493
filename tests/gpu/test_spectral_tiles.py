"""The Triton kernels of prompts' spectral terms against dense matrices in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels.gpu import configs
from overtone.kernels.gpu.batch import TILE, Tiles
from overtone.kernels.gpu.plans import BLOCK, FrameName
from overtone.kernels.gpu.tiles import add_core_tiles, add_inverse_tiles, analyse_tiles
from support.gpu_spectral import DEVICE, Case, check_close, mixed_case, numbers


def added(
    case: Case, x: torch.Tensor, y: torch.Tensor, rows: list[list[int]], owners: list[int], capability: int = 90
) -> torch.Tensor:
    """y after the three kernels, as they are configured for the shape. rows: by tile."""
    (p, q), (words, directories) = case.shape, case.arena()
    of_tiles = torch.tensor([directories[owner] if owner >= 0 else -1 for owner in owners], dtype=torch.int64)
    filled = [one + [-1] * (TILE - len(one)) for one in rows]
    tiles = Tiles(torch.tensor(filled, dtype=torch.int64, device=DEVICE).view(-1, TILE), of_tiles.to(DEVICE))
    forward, inverse = case.plan(inverse=False), case.plan(inverse=True)
    z = torch.full((len(rows), q, TILE), torch.nan, dtype=case.dtype, device=DEVICE)
    u = torch.full((len(rows), 2, TILE, inverse.blocks * BLOCK), torch.nan, dtype=case.dtype, device=DEVICE)
    found = y.to(DEVICE).clone()
    analyse_tiles(forward, x.to(DEVICE), tiles, z, configs.analyse_tiles_config(q, capability))
    add_core_tiles(inverse, z, tiles, words, case.layers, u, configs.core_tiles_config(capability))
    config = configs.inverse_tiles_config(p, capability)
    add_inverse_tiles(inverse, u, tiles, words, case.layers, found, config)
    return found


def check(case: Case, rows: list[list[int]], owners: list[int]) -> None:
    count = max((max(one) for one in rows), default=0) + 2
    x, y = numbers(count, case.shape[1], seed=1).to(case.dtype), numbers(count, case.width, seed=2).to(case.dtype)
    by_row = {row: owner for one, owner in zip(rows, owners, strict=True) for row in one}
    check_close(case, added(case, x, y, rows, owners), case.expected(x, y, by_row), y)


FULL = list(range(5, 5 + TILE))


@pytest.mark.parametrize(
    ("shape", "frame", "dtype"),
    [
        ((64, 192), "dct", torch.float16),
        ((64, 192), "dft", torch.float16),
        ((192, 576), "dct", torch.float32),
        ((896, 64), "dft", torch.float32),
    ],
    ids=str,
)
def test_tiles(shape: tuple[int, int], frame: FrameName, dtype: torch.dtype) -> None:
    """A full tile and a short one, tiles without an adapter or with one that has no core here or in one layer."""
    check(mixed_case(shape, dtype, frame), [FULL, [4, 0, 2], [1], [3], [22, 21]], [0, 2, -1, 3, 4])


@pytest.mark.parametrize("owners", [[0, 0], [-1, -1], [3, 1]], ids=str)
def test_adapters(owners: list[int]) -> None:
    check(mixed_case((64, 192), torch.float32), [FULL, [1, 0]], owners)


def test_no_tiles() -> None:
    check(mixed_case((64, 192), torch.float32), [], [])


@pytest.mark.parametrize(("shape", "frame"), [((8448, 64), "dct"), ((64, 8192), "dct"), ((8192, 64), "dft")], ids=str)
def test_long_transforms(shape: tuple[int, int], frame: FrameName) -> None:
    """Of three stages, on either side."""
    check(mixed_case(shape, torch.float32, frame), [[0, 3, 1]], [0])


def test_neighbours() -> None:
    """A tile's numbers are the same to the last bit alone and among others, whatever its rows are beside."""
    case = mixed_case((192, 64), torch.float16)
    x, y = numbers(24, 64, seed=1).half(), numbers(24, case.width, seed=2).half()
    together = added(case, x, y, [FULL, [0, 1]], [0, 2])
    assert torch.equal(added(case, x, y, [FULL], [0])[FULL], together[FULL])
    assert torch.equal(added(case, x, y, [[0]], [2])[0], together[0])
