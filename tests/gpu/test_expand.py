"""The Triton kernels of dense cores behind a shared projection against dense matrices in float64, in Triton's interpreter
or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from overtone.kernels.gpu.batch import TILE, Layers, Rows, Tiles
from overtone.kernels.gpu.expand import ExpandConfig, add_expanded, add_expanded_tiles
from overtone.kernels.gpu.low_rank_configs import expand_config
from overtone.kernels.gpu.records import expand_record
from support.arena import Arena, arena_of, tiles_of
from support.cores import POPULARITY, popular_adapters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, WIDTHS, COLUMNS = 48, (80, 136, 80), (8, 88, 232)
RANKS = ({0: 8, 1: 16}, {1: 33}, {0: 1, 2: 5}, {}, {0: 48, 1: 48, 2: 48})
SHARED = 5
"""An adapter whose first and last layer have one record."""
SMALL = ExpandConfig(block_r=16, block_p=64, tile_r=32, tile_p=64)
DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def random_arena(dtype: torch.dtype) -> tuple[list[dict[int, torch.Tensor]], Arena]:
    generator = torch.Generator().manual_seed(0)
    cores = [
        {slot: torch.randn(r, WIDTHS[slot], generator=generator).to(dtype) for slot, r in one.items()} for one in RANKS
    ]
    records = [{slot: expand_record(up, dtype) for slot, up in one.items()} for one in cores]
    both = torch.randn(7, WIDTHS[0], generator=generator).to(dtype)
    shared = expand_record(both, dtype)
    cores.append({0: both, 2: both})
    records.append({0: shared, 2: shared})
    return cores, arena_of(records, len(WIDTHS), "expand", dtype, DEVICE)


def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The projections of all rows of the batch, float32, and y."""
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(rows, COLUMNS[2] + WIDTHS[2] + 8, generator=generator)
    return torch.randn(rows, M + 16, generator=generator)[:, :M], y.to(dtype)


def computed(
    arena: Arena, owners: Sequence[int], rows: torch.Tensor, h: torch.Tensor, y: torch.Tensor, *, tiles: bool,
    config: ExpandConfig = SMALL,
) -> torch.Tensor:  # fmt: skip
    layers, found = Layers.of([0, 1, 2], list(COLUMNS), list(WIDTHS), DEVICE), y.to(DEVICE).clone()
    if tiles:
        of_tiles, tile_rows = tiles_of(owners, rows.tolist())
        batch = Tiles(tile_rows.to(DEVICE), arena.of(of_tiles).to(DEVICE))
        add_expanded_tiles(h.to(DEVICE), batch, arena.words, layers, found, config)
    else:
        rows_of = Rows(rows.to(DEVICE), arena.of(owners).to(DEVICE))
        add_expanded(h[rows].to(DEVICE), rows_of, arena.words, layers, found, config)
    return found.cpu()


BATCHES = {
    "none has one": [-1, -1],
    "mixed": [2, -1, 0, 1, 3, 4, SHARED],
    "empty": [],
    **{name: popular_adapters(name, 4) for name in POPULARITY},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("name", BATCHES)
def test_cores(name: str, tiles: bool, dtype: torch.dtype) -> None:
    """Three layers in one go, of different ranks, some with one record, some without; all else stays, to the last bit."""
    owners, (cores, arena) = BATCHES[name], random_arena(dtype)
    rows = torch.randperm(len(owners) + 2, generator=torch.Generator().manual_seed(1))[: len(owners)]
    h, y = inputs(len(owners) + 2, dtype)
    found, expected = computed(arena, owners, rows, h, y, tiles=tiles), y.double()
    for row, owner in zip(rows.tolist(), owners, strict=True):
        for slot, up in (cores[owner] if owner >= 0 else {}).items():
            to = slice(COLUMNS[slot], COLUMNS[slot] + WIDTHS[slot])
            expected[row, to] += up.double().T @ h[row, : len(up)].double()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 20)
    untouched = expected == y.double()
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
def test_a_row_is_the_same_alone_and_among_others(tiles: bool, dtype: torch.dtype) -> None:
    owners, (_, arena) = [4, -1, 1, 4], random_arena(dtype)
    rows, (h, y) = torch.arange(len(owners)), inputs(len(owners), dtype)
    together = computed(arena, owners, rows, h, y, tiles=tiles)
    for at, owner in enumerate(owners):
        alone = computed(arena, [owner], rows[at : at + 1], h, y, tiles=tiles)
        assert torch.equal(alone[at], together[at])


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("word", [-5, M + 1, 2**31 - 1])
def test_a_wrong_rank_changes_no_other_row(word: int, tiles: bool) -> None:
    """Of h at most all numbers are read, of the arena none beyond its end."""
    _, arena = random_arena(torch.float32)
    owners, rows, (h, y) = [SHARED, 0], torch.arange(2), inputs(3, torch.float32)
    before = computed(arena, owners, rows, h, y, tiles=tiles)
    directory = int(arena.directories[SHARED])
    arena.words.words[directory + int(arena.words.words[directory])] = word
    after = computed(arena, owners, rows, h, y, tiles=tiles)
    assert torch.equal(before[1:], after[1:])
    assert torch.equal(after[0], y[0])  # no room: nothing is added


def test_configurations_as_served() -> None:
    owners, rows = [4] * (TILE + 1), torch.arange(TILE + 1)
    cores, arena = random_arena(torch.float16)
    h, y = inputs(len(owners), torch.float16)
    found = computed(arena, owners, rows, h, y, tiles=True, config=expand_config(90)).double()
    for slot, up in cores[4].items():
        to = slice(COLUMNS[slot], COLUMNS[slot] + WIDTHS[slot])
        expected = y[:, to].double() + h.double() @ up.double()
        torch.testing.assert_close(found[:, to], expected, rtol=4e-3, atol=4e-2)
