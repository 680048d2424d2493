"""Spectral terms of single rows, y += C^T K C x, each row with the cores of its own adapter; and the parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from bench.cases import exact
from bench.cases.common import Bank, Cell, Operator, Place, Trial, contents, distinct, owners, relative
from bench.cases.grids import first, inputs, single_rows, small
from bench.roofline import analysis_work, spectral_bytes, spectral_work, synthesis_work
from bench.timing import Run

from overtone.kernels import CsrCore, DctFrame, SparseRows, compress, sparse_core
from overtone.kernels.gpu.analyse import analyse
from overtone.kernels.gpu.batch import Layers, Rows
from overtone.kernels.gpu.configs import analyse_config, synthesise_config
from overtone.kernels.gpu.placing import spectral_core
from overtone.kernels.gpu.plans import Plan, make_plan
from overtone.kernels.gpu.synthesise import add_synthesis

_REFERENCES = 4
"""Sets of inputs of the reference, whose cores are laid out for it before."""


@dataclass(frozen=True, eq=False)
class Core:
    """rows, cols, values of one layer's core, on the host."""

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor


@lru_cache(maxsize=64)
def plan_of(size: int, place: Place, *, inverse: bool) -> Plan:
    found = make_plan(size, place.dtype, place.device, inverse=inverse)
    assert found is not None
    return found


@lru_cache(maxsize=2)
def random_cores(q: int, widths: tuple[int, ...], n: int, many: int) -> list[list[Core]]:
    """By adapter, by layer: up to n coefficients anywhere, such that outputs are about as large as inputs."""
    found = []
    for _ in range(many):
        layers = []
        for p in widths:
            flat = torch.randint(p * q, (n,)).unique()
            layers.append(Core(flat // q, flat % q, torch.randn(len(flat)) * (p / n) ** 0.5))
        found.append(layers)
    return found


def bank_of(cell: Cell, adapters: int, place: Place) -> tuple[Bank, list[list[Core]]]:
    cores = random_cores(cell.q, cell.widths, cell.size, contents(adapters))
    host = Place(torch.device("cpu"), torch.float32)
    forward, inverse = plan_of(cell.q, host, inverse=False), partial(plan_of, place=host, inverse=True)
    records = [
        {
            "dct": {
                slot: spectral_core(one.rows, one.cols, one.values, (p, cell.q), forward, inverse(p), place.value_dtype)
                for slot, (one, p) in enumerate(zip(layers, cell.widths, strict=True))
            }
        }
        for layers in cores
    ]
    return Bank(records, len(cell.widths), adapters, place), cores


def layers_by_size(cell: Cell, place: Place) -> dict[int, Layers]:
    """One launch a width; the outputs of all layers lie side by side."""
    found = {}
    for size in dict.fromkeys(cell.widths):
        slots = [slot for slot, p in enumerate(cell.widths) if p == size]
        columns = [sum(cell.widths[:slot]) for slot in slots]
        found[size] = Layers.of(slots, columns, [size] * len(slots), place.device)
    return found


class Setting:
    """The inputs and outputs of all sets of a cell, and what is launched on them."""

    def __init__(self, cell: Cell, place: Place) -> None:
        each = sum(spectral_bytes(cell.size, p) for p in cell.widths) * distinct(cell)
        outs = sum(cell.widths)
        self.footprint = each + cell.rows * (cell.q * place.itemsize + 2 * outs * place.itemsize)
        self.cell, self.place, self.sets = cell, place, place.sets(self.footprint)
        self.owners, adapters = owners(cell, self.sets)
        self.bank, self.cores = bank_of(cell, adapters, place)
        self.x = place.randn(self.sets, cell.rows, cell.q)
        self.y = torch.zeros(self.sets, cell.rows, outs, dtype=place.dtype, device=place.device)
        self.layers = layers_by_size(cell, place)
        rows = torch.arange(cell.rows, device=place.device)
        self.batches = [Rows(rows, self.bank.directories("dct", which)) for which in self.owners]
        self.forward = plan_of(cell.q, place, inverse=False)

    def z(self) -> torch.Tensor:
        """NaN: whatever is read and was not written shows."""
        return torch.full((self.cell.rows, self.cell.q), torch.nan, dtype=self.place.dtype, device=self.place.device)

    def analyse(self, i: int, z: torch.Tensor) -> None:
        config = analyse_config(self.cell.q, self.cell.rows, self.place.capability)
        analyse(self.forward, self.x[i], self.batches[i], z, config)

    def synthesise(self, i: int, z: torch.Tensor, y: torch.Tensor) -> None:
        for size, layers in self.layers.items():
            plan = plan_of(size, self.place, inverse=True)
            config = synthesise_config(size, self.cell.rows, self.place.capability)
            add_synthesis(plan, z, self.batches[i], self.bank.words, layers, y, config)

    def expected(self, i: int) -> torch.Tensor:
        """(rows, outputs) float64."""
        z, which = exact.dct(self.x[i]), self.bank.content(self.owners[i])
        y = z.new_zeros(self.cell.rows, sum(self.cell.widths))
        for content in which.unique().tolist():
            mine, start = (which == content).nonzero()[:, 0].to(z.device), 0
            for one, p in zip(self.cores[content], self.cell.widths, strict=True):
                rows, cols, values = (part.to(z.device) for part in (one.rows, one.cols, one.values.double()))
                y[mine, start : start + p] = exact.inverse_dct(exact.sparse(rows, cols, values, z[mine], p))
                start += p
        return y

    def error(self) -> float:
        z, y = self.z(), torch.zeros_like(self.y[0])
        self.analyse(0, z)
        self.synthesise(0, z, y)
        return relative(y, self.expected(0))

    def reference(self) -> Run:
        """torch's FFT, all rows' cores as one sparse product, FFT."""
        sets, device = min(self.sets, _REFERENCES), self.place.device
        forward = DctFrame(self.cell.q, device)
        inverses = {p: DctFrame(p, device) for p in self.cell.widths}
        ready = [self._rows(i) for i in range(sets)]

        def call(i: int) -> None:
            z, start = forward.analyse(self.x[i].float()), 0
            for rows in ready[i]:
                p = rows.shape[0]
                self.y[i][:, start : start + p] += inverses[p].synthesise(rows.apply(z))
                start += p

        return Run(call, sets)

    def _rows(self, i: int) -> list[SparseRows]:
        found = []
        which = self.bank.content(self.owners[i]).tolist()
        for layer, p in enumerate(self.cell.widths):
            made: dict[int, CsrCore] = {}
            for content in set(which):
                one = self.cores[content][layer]
                made[content] = compress(
                    sparse_core(one.rows, one.cols, one.values, (p, self.cell.q)), self.place.device
                )
            found.append(SparseRows((p, self.cell.q), self.place.device))
            found[-1].update([made[content] for content in which])
        return found


def spectral(cell: Cell, place: Place) -> Trial:
    """All of it, as a step does it: z is written and read at one place."""
    setting = Setting(cell, place)
    z = setting.z()

    def call(i: int) -> None:
        setting.analyse(i, z)
        setting.synthesise(i, z, setting.y[i])

    work = spectral_work(cell.rows, distinct(cell), cell.q, cell.widths, cell.size, place.itemsize)
    return Trial(Run(call, setting.sets), setting.error, work, setting.footprint, setting.reference())


def analysis(cell: Cell, place: Place) -> Trial:
    work = analysis_work(cell.rows, cell.q, place.itemsize)
    sets = place.sets(work.bytes)
    x, forward = place.randn(sets, cell.rows, cell.q), plan_of(cell.q, place, inverse=False)
    z = torch.full((sets, cell.rows, cell.q), torch.nan, dtype=place.dtype, device=place.device)
    rows = torch.arange(cell.rows, device=place.device)
    batch, frame = Rows(rows, torch.zeros_like(rows)), DctFrame(cell.q, place.device)
    config = analyse_config(cell.q, cell.rows, place.capability)

    def error() -> float:
        z[0].fill_(torch.nan)
        analyse(forward, x[0], batch, z[0], config)
        k = torch.arange(cell.q)
        found = z[0].double()[:, forward.place(k).to(place.device)] * forward.weight(k).to(place.device)
        return relative(found, exact.dct(x[0]))

    ours = Run(lambda i: analyse(forward, x[i], batch, z[i], config), sets)
    reference = Run(lambda i: frame.analyse(x[i].float()), sets)
    return Trial(ours, error, work, work.bytes, reference)


def synthesis(cell: Cell, place: Place) -> Trial:
    """From a z of its own for each set."""
    setting = Setting(cell, place)
    z = [setting.z() for _ in range(setting.sets)]
    for i, one in enumerate(z):
        setting.analyse(i, one)
    work = synthesis_work(cell.rows, distinct(cell), cell.q, cell.widths, cell.size, place.itemsize)
    ours = Run(lambda i: setting.synthesise(i, z[i], setting.y[i]), setting.sets)
    return Trial(ours, setting.error, work, setting.footprint + cell.rows * cell.q * place.itemsize)


_SIZES = (1000, 3000)
OPERATORS = (
    Operator("spectral", spectral, single_rows("spectral", _SIZES), small("spectral", 60), lora=True),
    Operator("analyse", analysis, inputs("analyse"), small("analyse", 0)[:1]),
    Operator("add_synthesis", synthesis, first(single_rows("add_synthesis", _SIZES)), small("add_synthesis", 60)[:1]),
)
