"""The Triton kernels of low-rank pairs against dense matrices in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from overtone.kernels.gpu.batch import TILE, Layers, Rows, Tiles, Words
from overtone.kernels.gpu.low_rank import LowRankConfig, add_low_rank, add_low_rank_tiles
from overtone.kernels.gpu.low_rank_configs import low_rank_config
from overtone.kernels.gpu.records import pair_record
from support.arena import Arena, arena_of, tiles_of
from support.cores import POPULARITY, popular_adapters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q, WIDTHS = 96, (40, 136, 16)
COLUMNS = (0, 40, 184)  # between the second and the third layer's outputs lie 8 of another's
RANKS = ({0: 8, 1: 16, 2: 1}, {1: 33}, {0: 3, 2: 5}, {}, {0: 64, 1: 64, 2: 64}, {2: 2})
MOST = 64
SMALL = LowRankConfig(
    shrink_r=32, shrink_q=64, expand_p=64, tile_shrink_r=32, tile_shrink_q=64, tile_expand_r=32, tile_expand_p=64
)
DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
Pairs = list[dict[int, tuple[torch.Tensor, torch.Tensor]]]


def random_pairs(dtype: torch.dtype, ranks: Sequence[dict[int, int]] = RANKS) -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    return [{slot: (numbers(r, Q), numbers(r, WIDTHS[slot])) for slot, r in one.items()} for one in ranks]


def arena_with(pairs: Pairs, dtype: torch.dtype) -> Arena:
    records = [{slot: pair_record(*pair, dtype) for slot, pair in one.items()} for one in pairs]
    return arena_of(records, len(WIDTHS), "pair", dtype, DEVICE)


def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, of more rows and columns than are asked for."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(rows, Q + 16, generator=generator), torch.randn(rows, COLUMNS[2] + 16, generator=generator)
    return x.to(dtype)[:, :Q], y.to(dtype)


def computed(
    arena: Arena, owners: Sequence[int], rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, tiles: bool,
    config: LowRankConfig = SMALL, most: int = MOST,
) -> torch.Tensor:  # fmt: skip
    layers, found = Layers.of([0, 1, 2], list(COLUMNS), list(WIDTHS), DEVICE), y.to(DEVICE).clone()
    x = x.to(DEVICE)
    if tiles:
        of_tiles, tile_rows = tiles_of(owners, rows.tolist())
        h = torch.full((len(of_tiles), 3, most, TILE), torch.nan, device=DEVICE)
        batch = Tiles(tile_rows.to(DEVICE), arena.of(of_tiles).to(DEVICE))
        add_low_rank_tiles(x, batch, arena.words, layers, most, h, found, config)
    else:
        h = torch.full((len(owners), 3, most), torch.nan, device=DEVICE)
        batch = Rows(rows.to(DEVICE), arena.of(owners).to(DEVICE))
        add_low_rank(x, batch, arena.words, layers, most, h, found, config)
    return found.cpu()


def expected(pairs: Pairs, owners: Sequence[int], rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = y.double()
    for row, owner in zip(rows.tolist(), owners, strict=True):
        for slot, (down, up) in (pairs[owner] if owner >= 0 else {}).items():
            delta = up.double().T @ (down.double() @ x[row].double())
            result[row, COLUMNS[slot] : COLUMNS[slot] + WIDTHS[slot]] += delta
    return result


BATCHES = {
    "none has one": [-1, -1],
    "mixed": [2, -1, 0, 1, 3, 4],
    "empty": [],
    **{name: popular_adapters(name, 4) for name in POPULARITY},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("name", BATCHES)
def test_pairs(name: str, tiles: bool, dtype: torch.dtype) -> None:
    """Three layers of different widths in one go, of different ranks or without a pair; all else stays, to the last
    bit."""
    owners, pairs = BATCHES[name], random_pairs(dtype)
    rows = torch.randperm(len(owners) + 2, generator=torch.Generator().manual_seed(1))[: len(owners)]
    x, y = inputs(len(owners) + 2, dtype)
    found = computed(arena_with(pairs, dtype), owners, rows, x, y, tiles=tiles)
    right = expected(pairs, owners, rows, x, y)
    torch.testing.assert_close(found.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 20)
    untouched = right == y.double()
    assert torch.equal(found[untouched], y[untouched])


def test_more_rows_than_a_tile() -> None:
    owners, pairs = [1] * (TILE + 3) + [5] * 2, random_pairs(torch.float32)
    rows = torch.arange(len(owners))
    x, y = inputs(len(owners), torch.float32)
    found = computed(arena_with(pairs, torch.float32), owners, rows, x, y, tiles=True)
    torch.testing.assert_close(found.double(), expected(pairs, owners, rows, x, y), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
def test_a_row_is_the_same_alone_and_among_others(tiles: bool, dtype: torch.dtype) -> None:
    owners, arena = [1, -1, 4, 1], arena_with(random_pairs(dtype), dtype)
    rows = torch.arange(len(owners))
    x, y = inputs(len(owners), dtype)
    together = computed(arena, owners, rows, x, y, tiles=tiles)
    for at, owner in enumerate(owners):
        alone = computed(arena, [owner], rows[at : at + 1], x, y, tiles=tiles)
        assert torch.equal(alone[at], together[at])


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("word", [-5, 65, 2**31 - 1])
def test_a_wrong_rank_changes_no_other_row(word: int, tiles: bool) -> None:
    """It is at most the highest there is, and nothing is read beyond the arena: with the last adapter's record there is
    no room for so many."""
    pairs = random_pairs(torch.float32)
    arena = arena_with(pairs, torch.float32)
    owners, rows = [5, 0, 4], torch.arange(3)
    x, y = inputs(4, torch.float32)
    before = computed(arena, owners, rows, x, y, tiles=tiles)
    for owner in (5, 4):  # the last of the arena, and one before it
        directory = int(arena.directories[owner])
        record = directory + int(arena.words.words[directory + 2])
        arena.words.words[record] = word
    after = computed(arena, owners, rows, x, y, tiles=tiles)
    assert torch.equal(before[1], after[1])
    assert torch.equal(after[3], y[3])
    assert torch.equal(after[0], y[0])  # no room: nothing is added
    assert torch.equal(before[2, : COLUMNS[2]], after[2, : COLUMNS[2]])


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("word", [-(2**31), 2**31 - 1, 10**6])
def test_a_record_outside_the_arena_is_none(word: int, tiles: bool) -> None:
    arena = arena_with(random_pairs(torch.float32), torch.float32)
    x, y = inputs(2, torch.float32)
    arena.words.words[int(arena.directories[5]) + 2] = word
    assert torch.equal(computed(arena, [5], torch.arange(1), x, y, tiles=tiles), y)


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("most", [1, 64])
def test_configurations_as_served(most: int, tiles: bool) -> None:
    ranks = [{slot: min(r, most) for slot, r in one.items()} for one in RANKS]
    pairs, owners = random_pairs(torch.float16, ranks), [0, 4]
    rows, (x, y) = torch.arange(2), inputs(2, torch.float16)
    found = computed(
        arena_with(pairs, torch.float16), owners, rows, x, y, tiles=tiles, config=low_rank_config(90), most=most
    )
    torch.testing.assert_close(found.double(), expected(pairs, owners, rows, x, y), rtol=4e-3, atol=8e-2)


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
def test_an_arena_of_gibibytes(tiles: bool) -> None:
    """Its words are fewer than 2^31, its numbers more. Memory that nothing touches is not taken."""
    pairs, owners, rows = random_pairs(torch.float16), [0, 4], torch.arange(2)
    x, y = inputs(2, torch.float16)
    small = arena_with(pairs, torch.float16)
    large = torch.empty(3 << 29, dtype=torch.int32, device=DEVICE)
    large[: len(small.words.words)] = small.words.words
    arena = replace(small, words=Words.of(large, torch.float16))
    assert torch.equal(
        computed(arena, owners, rows, x, y, tiles=tiles), computed(small, owners, rows, x, y, tiles=tiles)
    )
    assert not torch.equal(computed(arena, owners, rows, x, y, tiles=tiles), y)
