"""Prompts, in tiles of rows of one adapter: spectral terms, low-rank pairs, shared projections; and merging an adapter."""

from __future__ import annotations

import torch
from bench.cases import exact
from bench.cases.common import Bank, Cell, Operator, Place, Trial, relative
from bench.cases.grids import prompts, small_prompts
from bench.cases.low_rank import expand_bank, expected_pairs, layers_of, pair_bank
from bench.cases.spectral import bank_of, layers_by_size, plan_of
from bench.roofline import expand_work, low_rank_work, materialise_work, product_work, spectral_work
from bench.timing import Run

from overtone.kernels import DCT, DctFrame, compress, sparse_core
from overtone.kernels.gpu.batch import TILE, Tiles
from overtone.kernels.gpu.configs import analyse_tiles_config, core_tiles_config, inverse_tiles_config
from overtone.kernels.gpu.expand import add_expanded_tiles
from overtone.kernels.gpu.low_rank import add_low_rank_tiles
from overtone.kernels.gpu.low_rank_configs import expand_config, low_rank_config, materialise_config
from overtone.kernels.gpu.materialise import filled_rows, materialise, waves
from overtone.kernels.gpu.plans import BLOCK
from overtone.kernels.gpu.tiles import add_core_tiles, add_inverse_tiles, analyse_tiles

_SETS = 2
"""Of inputs: one call touches more than the cache holds, or nearly so."""


def of_rows(cell: Cell) -> torch.Tensor:
    """(rows,) which of the cell's adapters each token has: as many prompts, one after another."""
    return torch.arange(cell.rows) * cell.adapters // cell.rows


def tiles_of(cell: Cell, bank: Bank, kind: str, first: int, place: Place) -> Tiles:
    rows, adapters = [], []
    each = of_rows(cell)
    for adapter in range(cell.adapters):
        mine = (each == adapter).nonzero()[:, 0].tolist()
        for begin in range(0, len(mine), TILE):
            tile = mine[begin : begin + TILE]
            rows.append(tile + [-1] * (TILE - len(tile)))
            adapters.append(first + adapter)
    return Tiles(torch.tensor(rows, device=place.device), bank.directories(kind, torch.tensor(adapters)))


class Prompts:
    """The inputs and outputs of all sets of a cell."""

    def __init__(self, cell: Cell, place: Place, bank: Bank, kind: str, inputs: int) -> None:
        self.cell, self.bank = cell, bank
        self.x = place.randn(_SETS, cell.rows, inputs)
        self.y = torch.zeros(_SETS, cell.rows, sum(cell.widths), dtype=place.dtype, device=place.device)
        self.tiles = [tiles_of(cell, bank, kind, i * cell.adapters, place) for i in range(_SETS)]
        self.many = len(self.tiles[0].rows)

    def which(self, i: int) -> torch.Tensor:
        """Whose numbers each row has."""
        return self.bank.content(of_rows(self.cell) + i * self.cell.adapters)


def spectral(cell: Cell, place: Place) -> Trial:
    bank, cores = bank_of(cell, _SETS * cell.adapters, place)
    given, layers = Prompts(cell, place, bank, "dct", cell.q), layers_by_size(cell, place)
    forward, inverses = plan_of(cell.q, place, inverse=False), {p: plan_of(p, place, inverse=True) for p in layers}
    z = torch.full((given.many, cell.q, TILE), torch.nan, dtype=place.dtype, device=place.device)
    u = {
        p: z.new_full((given.many, len(one.slots), TILE, inverses[p].blocks * BLOCK), torch.nan)
        for p, one in layers.items()
    }

    def call(i: int) -> None:
        tiles = given.tiles[i]
        analyse_tiles(forward, given.x[i], tiles, z, analyse_tiles_config(cell.q, place.capability))
        for p, one in layers.items():
            add_core_tiles(inverses[p], z, tiles, bank.words, one, u[p], core_tiles_config(place.capability))
            config = inverse_tiles_config(p, place.capability)
            add_inverse_tiles(inverses[p], u[p], tiles, bank.words, one, given.y[i], config)

    def expected() -> torch.Tensor:
        found, which = exact.dct(given.x[0]), given.which(0)
        y = found.new_zeros(cell.rows, sum(cell.widths))
        for content in which.unique().tolist():
            mine, start = (which == content).nonzero()[:, 0].to(y.device), 0
            for one, p in zip(cores[content], cell.widths, strict=True):
                rows, cols, values = (part.to(y.device) for part in (one.rows, one.cols, one.values.double()))
                y[mine, start : start + p] = exact.inverse_dct(exact.sparse(rows, cols, values, found[mine], p))
                start += p
        return y

    def error() -> float:
        given.y[0].zero_()
        call(0)
        return relative(given.y[0], expected())

    work = spectral_work(cell.rows, cell.adapters, cell.q, cell.widths, cell.size, place.itemsize)
    return Trial(Run(call, _SETS), error, work, work.bytes, _by_adapter(cell, place, given, cores))


def _by_adapter(cell: Cell, place: Place, given: Prompts, cores: list) -> Run:
    """torch's FFT for all rows, a sparse product for each adapter."""
    forward = DctFrame(cell.q, place.device)
    inverses = {p: DctFrame(p, place.device) for p in cell.widths}
    spans, begin = [], 0
    for adapter in range(cell.adapters):
        end = begin + int((of_rows(cell) == adapter).sum())
        spans.append(slice(begin, end))
        begin = end
    ready = [
        [
            (
                span,
                [
                    compress(sparse_core(one.rows, one.cols, one.values, (p, cell.q)), place.device)
                    for one, p in zip(cores[int(given.which(i)[span.start])], cell.widths, strict=True)
                ],
            )
            for span in spans
        ]
        for i in range(_SETS)
    ]

    def call(i: int) -> None:
        z = forward.analyse(given.x[i].float())
        for span, layers in ready[i]:
            start = 0
            for core in layers:
                p = core.shape[0]
                given.y[i][span, start : start + p] += inverses[p].synthesise(core.apply(z[span]).contiguous())
                start += p

    return Run(call, _SETS)


def low_rank(cell: Cell, place: Place) -> Trial:
    bank, pairs = pair_bank(cell, _SETS * cell.adapters, place)
    given, layers = Prompts(cell, place, bank, "pair", cell.q), layers_of(cell, place)
    h = torch.full((given.many, len(cell.widths), cell.size, TILE), torch.nan, device=place.device)
    config = low_rank_config(place.capability)

    def call(i: int) -> None:
        add_low_rank_tiles(given.x[i], given.tiles[i], bank.words, layers, cell.size, h, given.y[i], config)

    def error() -> float:
        given.y[0].zero_()
        call(0)
        return relative(given.y[0], expected_pairs(cell, given.x[0], given.which(0), pairs, place.dtype))

    work = low_rank_work(cell.rows, cell.adapters, cell.q, cell.widths, cell.size, place.itemsize)
    return Trial(Run(call, _SETS), error, work, work.bytes)


def expanded(cell: Cell, place: Place) -> Trial:
    bank, pairs = expand_bank(cell, _SETS * cell.adapters, place)
    given, layers = Prompts(cell, place, bank, "expand", cell.size), layers_of(cell, place)
    h, config = given.x.float(), expand_config(place.capability)

    def call(i: int) -> None:
        add_expanded_tiles(h[i], given.tiles[i], bank.words, layers, given.y[i], config)

    def error() -> float:
        given.y[0].zero_()
        call(0)
        ups = [[(torch.eye(cell.size), up) for _, up in one] for one in pairs]
        return relative(given.y[0], expected_pairs(cell, h[0], given.which(0), ups, place.dtype))

    work = expand_work(cell.rows, cell.adapters, cell.widths, cell.size, place.itemsize)
    return Trial(Run(call, _SETS), error, work, work.bytes)


def merged(cell: Cell, place: Place) -> Trial:
    """W + C^T K C of one layer, into a matrix of its own; reference: two transforms of the dense core by FFT."""
    (p,), q = cell.widths, cell.q
    flat = torch.randint(p * q, (cell.size,)).unique()
    host = sparse_core(flat // q, flat % q, torch.randn(len(flat)) * (p / cell.size) ** 0.5, (p, q))
    core = compress(host, place.device)
    analysis, synthesis = waves(DCT, q, place.device), waves(DCT, p, place.device)
    filled = filled_rows(core, analysis, synthesis)
    between, weight = place.randn(len(filled.rows), q), place.randn(p, q) * 0.1
    out, config = torch.empty_like(weight), materialise_config(place.capability)
    rows, columns = DctFrame(p, place.device), DctFrame(q, place.device)

    def call(i: int) -> None:
        materialise(filled, analysis, synthesis, between, weight, out, config)

    def error() -> float:
        out.fill_(torch.nan)
        call(0)
        dense = torch.zeros(p, q, dtype=torch.float64, device=place.device)
        dense[core.rows.long(), core.cols.long()] = core.values.double()
        delta = exact.inverse_dct(exact.inverse_dct(dense).T).T
        return relative(out, delta + weight.double())

    def plain(i: int) -> None:
        dense = torch.zeros(p, q, device=place.device)
        dense[core.rows.long(), core.cols.long()] = core.values
        delta = rows.synthesise(columns.synthesise(dense).T.contiguous()).T
        torch.add(weight, delta, out=out) if out.dtype is torch.float32 else out.copy_(weight + delta)

    work = materialise_work(len(filled.rows), p, q, place.itemsize)
    return Trial(Run(call), error, work, work.bytes, Run(plain))


def product(cell: Cell, place: Place) -> Trial:
    """The base model's own product, to compare with: torch's."""
    outs = sum(cell.widths)
    work = product_work(cell.rows, outs, cell.q, place.itemsize)
    sets = place.sets(work.bytes)
    x, weight = place.randn(sets, cell.rows, cell.q), place.randn(sets, outs, cell.q)
    y = torch.empty(sets, cell.rows, outs, dtype=place.dtype, device=place.device)

    def error() -> float:
        torch.mm(x[0], weight[0].T, out=y[0])
        return relative(y[0], x[0].double() @ weight[0].double().T)

    return Trial(Run(lambda i: torch.mm(x[i], weight[i].T, out=y[i]), sets), error, work, work.bytes)


_MERGED = [(4096, (4096,)), (4096, (14336,)), (14336, (4096,)), (4096, (1024,))]
OPERATORS = (
    Operator("spectral tiles", spectral, prompts("spectral tiles", (1000, 3000)), small_prompts("spectral tiles", 60)),
    Operator("low-rank tiles", low_rank, prompts("low-rank tiles", (16,)), small_prompts("low-rank tiles", 8)),
    Operator("expanded tiles", expanded, prompts("expanded tiles", (32,)), small_prompts("expanded tiles", 16)),
    Operator(
        "materialise",
        merged,
        [Cell("materialise", q, widths, 0, n, "") for n in (1000, 3000) for q, widths in _MERGED],
        [Cell("materialise", 96, (64,), 0, 60, "")],
    ),
    Operator(
        "base product (torch)",
        product,
        [
            Cell("base product (torch)", q, widths, rows, 0, "")
            for rows in (64, 1, 8, 256, 2048)
            for q, widths in ((4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
        ],
        [Cell("base product (torch)", 96, (64,), 3, 0, "")],
    ),
)
