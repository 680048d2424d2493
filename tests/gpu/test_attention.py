"""The Triton kernels of attention over a paged cache against plain attention in float64, in Triton's interpreter or on a
GPU. All slots that no token sees hold NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from overtone.kernels.gpu.attend_decode import DecodeConfig, SeenKeys, attend_decode, decode_workspace, splits_of
from overtone.kernels.gpu.attend_prefill import PrefillConfig, Spans, attend_prefill, prefill_tiles
from overtone.kernels.gpu.scoring import Scoring
from overtone.models.attend import Softmax, attend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DECODE = DecodeConfig(split=32, block_n=16)
PREFILL = PrefillConfig(block_m=32, block_n=16, warps=4)
LENGTHS = [1, 17, 0, 32, 100, 8]


class Heads(NamedTuple):
    query: int
    key: int
    dim: int
    page: int = 16


SHAPES = [Heads(9, 3, 64), Heads(4, 4, 16, page=32), Heads(8, 2, 80, page=8), Heads(17, 1, 128)]
SCORINGS = {
    "plain": Scoring(0.3),
    "window": Scoring(0.2, window=20),
    "one": Scoring(0.2, window=1),
    "capped": Scoring(0.4, cap=1.5),
    "sinks": Scoring(0.25, sinks=torch.linspace(-2.0, 6.0, 9)),
    "all": Scoring(0.2, cap=2.0, sinks=torch.linspace(-2.0, 2.0, 9), window=40),
}


CASES = pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in SCORINGS), ("plain", torch.float32), ("all", torch.float32)],
    ids=str,
)


class Cached:
    """Sequences of given lengths in a cache; a table of their pages."""

    def __init__(self, lengths: list[int], heads: Heads, dtype: torch.dtype, seed: int = 0) -> None:
        self.heads, self.lengths = heads, lengths
        self.generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // heads.page) for length in lengths]
        pages = (torch.randperm(sum(needed) + 2, generator=self.generator) + 1).tolist()
        self.table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
        cache = torch.full(((len(pages) + 1) * heads.page, 2, heads.key, heads.dim), torch.nan)
        cache[: heads.page] = 0
        self.slots = []
        for row, length in enumerate(lengths):
            own = [pages.pop() for _ in range(needed[row])]
            self.table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
            slots = torch.tensor([own[i // heads.page] * heads.page + i % heads.page for i in range(length)]).long()
            cache[slots] = self.numbers(length, 2, heads.key, heads.dim)
            self.slots.append(slots)
        self.cache = cache.to(dtype)

    def paged(self) -> torch.Tensor:
        """The cache as a layer among others has it: their parts of a page lie between the pages."""
        pages = self.cache.view(-1, self.heads.page, *self.cache.shape[1:])
        every = torch.full((len(pages), 3, *pages.shape[1:]), torch.nan, dtype=pages.dtype, device=DEVICE)
        every[:, 1] = pages.to(DEVICE)
        return every[:, 1]

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def packed(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Queries as the layer has them: in front of keys and values."""
        both = self.numbers(tokens, self.heads.query + 2 * self.heads.key, self.heads.dim).to(dtype).to(DEVICE)
        return both[:, : self.heads.query]

    def expected(self, row: int, query: torch.Tensor, past: int, scoring: Scoring) -> torch.Tensor:
        """query: (n, heads, D), the tokens from the `past`-th on of sequence `row`."""
        n = len(query)
        seen = self.cache[self.slots[row][: past + n]].double()
        keys, values = seen[:, 0].transpose(0, 1)[None], seen[:, 1].transpose(0, 1)[None]
        behind = past + torch.arange(n)[:, None] - torch.arange(past + n)[None]
        hidden = (behind < 0) | ((behind >= scoring.window) if scoring.window > 0 else False)
        mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None]
        softmax = Softmax(scoring.scale, scoring.cap, scoring.sinks)
        return attend(query.cpu().double().transpose(0, 1)[None], keys, values, mask, softmax)[0].transpose(0, 1)


def on_device(scoring: Scoring) -> Scoring:
    return scoring if scoring.sinks is None else replace(scoring, sinks=scoring.sinks.to(DEVICE))


def decoded(
    made: Cached,
    query: torch.Tensor,
    rows: list[int],
    tokens: list[int],
    scoring: Scoring,
    config: DecodeConfig,
    more: int = 0,
) -> torch.Tensor:
    """`more` parts than needed; what is not written is 7."""
    lengths = [made.lengths[row] for row in rows]
    splits = splits_of(max(lengths), scoring.window, config) + more
    seen = SeenKeys(
        torch.tensor(tokens, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        made.table[rows].to(DEVICE),
    )
    room = torch.full((decode_workspace(len(rows), *query.shape[1:], splits),), torch.nan, device=DEVICE)
    out = torch.full(query.shape, 7.0, dtype=query.dtype, device=DEVICE)
    cache = made.paged()
    attend_decode(query, cache, seen, out, room, splits, on_device(scoring), config)
    return out


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if found.dtype is torch.float32 else 4e-3
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@CASES
def test_single_tokens(name: str, dtype: torch.dtype) -> None:
    made, scoring = Cached(LENGTHS, SHAPES[0], dtype), SCORINGS[name]
    rows, tokens = list(range(len(LENGTHS))), [3, 0, 8, 1, 2, -1]
    query = made.packed(9, dtype)
    found = decoded(made, query, rows, tokens, scoring, DECODE)
    for row, token in zip(rows[:-1], tokens[:-1], strict=True):
        if LENGTHS[row] == 0:
            assert not found[token].any()
        else:
            close(found[token][None], made.expected(row, query[token][None], LENGTHS[row] - 1, scoring))
    assert (found[4:8] == 7.0).all()


@pytest.mark.parametrize("heads", SHAPES[1:], ids=str)
def test_single_tokens_of_other_shapes(heads: Heads) -> None:
    made, scoring = Cached([1, 40, 64], heads, torch.float16), Scoring(heads.dim**-0.5)
    query = made.packed(3, torch.float16)
    found = decoded(made, query, [0, 1, 2], [0, 1, 2], scoring, DECODE)
    for row in range(3):
        close(found[row][None], made.expected(row, query[row][None], made.lengths[row] - 1, scoring))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_token_alone(name: str) -> None:
    """The same bits alone and among others, with more parts than needed, and when a program takes several."""
    made, scoring = Cached(LENGTHS, SHAPES[0], torch.float16), SCORINGS[name]
    query = made.packed(len(LENGTHS), torch.float16)
    rows = list(range(len(LENGTHS)))
    together = decoded(made, query, rows, rows, scoring, DECODE)
    assert torch.equal(together, decoded(made, query, rows, rows, scoring, replace(DECODE, programs=1), more=1))
    for row in rows:
        assert torch.equal(together[row], decoded(made, query, [row], [row], scoring, DECODE)[row])


def test_parts() -> None:
    assert [splits_of(keys, 0, DECODE) for keys in (0, 1, 32, 33, 100)] == [1, 1, 1, 2, 4]
    assert [splits_of(100, window, DECODE) for window in (1, 2, 33, 34, 1000)] == [1, 2, 2, 3, 4]


def filled(
    made: Cached, query: torch.Tensor, spans: list[tuple[int, int, int, int]], scoring: Scoring, config: PrefillConfig
) -> torch.Tensor:
    """spans: row, first packed token, tokens, past; what is not written is 7."""
    group = made.heads.query // made.heads.key
    rows, starts, tokens, past = (list(column) for column in zip(*spans, strict=True))
    table = made.table[rows].to(DEVICE)
    device_spans = Spans(*(torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (starts, tokens, past)), table)
    tiles = prefill_tiles(list(zip(tokens, past, strict=True)), group, config, DEVICE, tiles=9)
    out = torch.full(query.shape, 7.0, dtype=query.dtype, device=DEVICE)
    cache = made.paged()
    attend_prefill(query, cache, device_spans, tiles, out, on_device(scoring), config)
    return out


@CASES
def test_prompts(name: str, dtype: torch.dtype) -> None:
    scoring, lengths = SCORINGS[name], [17, 41, 33, 1]
    made = Cached(lengths, SHAPES[0], dtype)
    spans = [(0, 2, 17, 0), (1, 19, 1, 40), (2, 20, 20, 13), (3, 40, 1, 0)]
    query = made.packed(43, dtype)
    found = filled(made, query, spans, scoring, PREFILL)
    for row, start, tokens, past in spans:
        own = slice(start, start + tokens)
        close(found[own], made.expected(row, query[own], past, scoring))
    assert (found[[0, 1, 41, 42]] == 7.0).all()


@pytest.mark.parametrize("heads", SHAPES[1:], ids=str)
def test_prompts_of_other_shapes(heads: Heads) -> None:
    made, scoring = Cached([21, 40], heads, torch.float16), Scoring(heads.dim**-0.5)
    query = made.packed(30, torch.float16)
    found = filled(made, query, [(0, 0, 21, 0), (1, 21, 9, 31)], scoring, PREFILL)
    close(found[:21], made.expected(0, query[:21], 0, scoring))
    close(found[21:], made.expected(1, query[21:], 31, scoring))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_prompt_in_chunks(name: str) -> None:
    """The same bits whole and in pieces, alone and beside another. The products of the interpreter round rows of a tile
    differently by their place in it, those of a GPU do not."""
    made, scoring = Cached([45, 20], SHAPES[0], torch.float16), SCORINGS[name]
    query = made.packed(65, torch.float16)
    whole = filled(made, query, [(0, 0, 45, 0), (1, 45, 20, 0)], scoring, PREFILL)[:45]
    by_tile = filled(made, query, [(0, 0, 10, 0), (0, 10, 20, 10), (0, 30, 15, 30)], scoring, PREFILL)[:45]
    anyhow = filled(made, query, [(0, 0, 7, 0), (0, 7, 26, 7), (0, 33, 12, 33)], scoring, PREFILL)[:45]
    assert torch.equal(whole, by_tile)
    close(anyhow, whole.cpu())
    assert DEVICE.type == "cpu" or torch.equal(whole, anyhow)


def test_tiles() -> None:
    """Those with most keys first, the rest empty."""
    tiles = prefill_tiles([(25, 0), (3, 90)], 3, PREFILL, torch.device("cpu"), tiles=6)
    assert tiles.spans.tolist() == [1, 0, 0, 0, -1, -1]
    assert tiles.firsts.tolist() == [0, 20, 10, 0, -1, -1]
