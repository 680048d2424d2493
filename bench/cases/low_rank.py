"""Low-rank pairs of single rows, y += U^T D x, and shared projections, y += U^T h, each row with its own adapter's."""

from __future__ import annotations

from functools import lru_cache

import torch
from bench.cases.common import Bank, Cell, Operator, Place, Trial, contents, distinct, owners, relative
from bench.cases.grids import first, single_rows, small
from bench.roofline import FLOAT32, expand_work, low_rank_work
from bench.timing import Run

from overtone.kernels.gpu.batch import Layers, Rows
from overtone.kernels.gpu.expand import add_expanded
from overtone.kernels.gpu.low_rank import add_low_rank
from overtone.kernels.gpu.low_rank_configs import expand_config, low_rank_config
from overtone.kernels.gpu.records import expand_record, pair_record

_REFERENCES = 2
"""Sets of inputs of the reference, whose matrices are stacked for it before."""
RANK = 16
"""Of the pairs that spectral terms are measured beside."""
Pair = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=2)
def random_pairs(q: int, widths: tuple[int, ...], r: int, many: int) -> list[list[Pair]]:
    """By adapter, by layer, (r, q) and (r, p): outputs are about as large as inputs."""
    return [[(torch.randn(r, q) * q**-0.5, torch.randn(r, p) * r**-0.5) for p in widths] for _ in range(many)]


def pair_bank(cell: Cell, adapters: int, place: Place) -> tuple[Bank, list[list[Pair]]]:
    pairs = random_pairs(cell.q, cell.widths, cell.size, contents(adapters))
    records = [
        {"pair": {slot: pair_record(down, up, place.dtype) for slot, (down, up) in enumerate(layers)}}
        for layers in pairs
    ]
    return Bank(records, len(cell.widths), adapters, place), pairs


def expand_bank(cell: Cell, adapters: int, place: Place) -> tuple[Bank, list[list[Pair]]]:
    pairs = random_pairs(cell.q, cell.widths, cell.size, contents(adapters))
    records = [
        {"expand": {slot: expand_record(up, place.dtype) for slot, (_, up) in enumerate(layers)}} for layers in pairs
    ]
    return Bank(records, len(cell.widths), adapters, place), pairs


def layers_of(cell: Cell, place: Place) -> Layers:
    columns = [sum(cell.widths[:slot]) for slot in range(len(cell.widths))]
    return Layers.of(list(range(len(columns))), columns, list(cell.widths), place.device)


def expected_pairs(
    cell: Cell, x: torch.Tensor, which: torch.Tensor, pairs: list[list[Pair]], dtype: torch.dtype
) -> torch.Tensor:
    """(rows, outputs) float64. which: the pairs of each row."""
    y = torch.zeros(len(x), sum(cell.widths), dtype=torch.float64, device=x.device)
    for content in which.unique().tolist():
        mine, start = (which == content).nonzero()[:, 0].to(x.device), 0
        for down, up in pairs[content]:
            d, u = (part.to(x.device, dtype).double() for part in (down, up))
            y[mine, start : start + up.shape[1]] = x[mine].double() @ d.T @ u
            start += up.shape[1]
    return y


def low_rank(cell: Cell, place: Place) -> Trial:
    work = low_rank_work(cell.rows, distinct(cell), cell.q, cell.widths, cell.size, place.itemsize)
    sets = place.sets(work.bytes)
    which, adapters = owners(cell, sets)
    bank, pairs = pair_bank(cell, adapters, place)
    x, outs = place.randn(sets, cell.rows, cell.q), sum(cell.widths)
    y = torch.zeros(sets, cell.rows, outs, dtype=place.dtype, device=place.device)
    h = torch.full((cell.rows, len(cell.widths), cell.size), torch.nan, dtype=torch.float32, device=place.device)
    rows = torch.arange(cell.rows, device=place.device)
    batches = [Rows(rows, bank.directories("pair", one)) for one in which]
    layers, config = layers_of(cell, place), low_rank_config(place.capability)

    def call(i: int) -> None:
        add_low_rank(x[i], batches[i], bank.words, layers, cell.size, h, y[i], config)

    def error() -> float:
        y[0].zero_()
        h.fill_(torch.nan)
        call(0)
        return relative(y[0], expected_pairs(cell, x[0], bank.content(which[0]), pairs, place.dtype))

    return Trial(Run(call, sets), error, work, work.bytes, _stacked(cell, place, x, y, which, bank, pairs))


def _stacked(
    cell: Cell, place: Place, x: torch.Tensor, y: torch.Tensor, which: torch.Tensor, bank: Bank, pairs: list[list[Pair]]
) -> Run:
    """Batched products of the rows' matrices; of one adapter, two ordinary products."""
    sets = min(len(x), _REFERENCES)
    one = cell.popularity == "identical"
    ready = []
    for i in range(sets):
        mine = bank.content(which[i]).tolist()
        mine = mine[:1] if one else mine
        layers = range(len(cell.widths))
        ready.append([tuple(_stack(pairs, mine, layer, part, place) for part in (0, 1)) for layer in layers])

    def call(i: int) -> None:
        start = 0
        for down, up in ready[i]:
            p = up.shape[2]
            if one:
                y[i][:, start : start + p] += x[i] @ down[0].T @ up[0]
            else:
                h = torch.bmm(x[i][:, None], down.transpose(1, 2))
                y[i][:, start : start + p] += torch.bmm(h, up)[:, 0]
            start += p

    return Run(call, sets)


def _stack(pairs: list[list[Pair]], which: list[int], layer: int, part: int, place: Place) -> torch.Tensor:
    return torch.stack([pairs[content][layer][part] for content in which]).to(place.device, place.dtype)


def expanded(cell: Cell, place: Place) -> Trial:
    """h is there already; without the projection, which is an ordinary product."""
    work = expand_work(cell.rows, distinct(cell), cell.widths, cell.size, place.itemsize)
    sets = place.sets(work.bytes)
    which, adapters = owners(cell, sets)
    bank, pairs = expand_bank(cell, adapters, place)
    h = place.randn(sets, cell.rows, cell.size).float()
    y = torch.zeros(sets, cell.rows, sum(cell.widths), dtype=place.dtype, device=place.device)
    rows = torch.arange(cell.rows, device=place.device)
    batches = [Rows(rows, bank.directories("expand", one)) for one in which]
    layers, config = layers_of(cell, place), expand_config(place.capability)

    def call(i: int) -> None:
        add_expanded(h[i], batches[i], bank.words, layers, y[i], config)

    def error() -> float:
        y[0].zero_()
        call(0)
        identity = [[(torch.eye(cell.size), up) for _, up in one] for one in pairs]
        return relative(y[0], expected_pairs(cell, h[0], bank.content(which[0]), identity, place.dtype))

    mine = [bank.content(which[i]).tolist() for i in range(min(sets, _REFERENCES))]
    ups = [
        torch.stack([torch.cat([up for _, up in pairs[content]], 1) for content in each]).to(place.device, place.dtype)
        for each in mine
    ]

    def plain(i: int) -> None:
        y[i].add_(torch.bmm(h[i].to(place.dtype)[:, None], ups[i])[:, 0])

    return Trial(Run(call, sets), error, work, work.bytes + cell.rows * FLOAT32, Run(plain, len(ups)))


OPERATORS = (
    Operator("add_low_rank", low_rank, first(single_rows("add_low_rank", (RANK,))), small("add_low_rank", 8)),
    Operator("add_expanded", expanded, first(single_rows("add_expanded", (32,))), small("add_expanded", 16)),
)
