"""Terms of every kind in one batch: each row is what its own adapter's dense float64 delta makes of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from overtone.adapters.resident import make_resident
from overtone.kernels import (
    IDENTITY,
    WEIGHT,
    Delta,
    DenseCore,
    DiagonalCore,
    FrameBank,
    LowRankCore,
    ResidentDelta,
    SharedMatrix,
    Term,
    projection,
    reference,
)
from overtone.kernels.native import NativeKernels, native_kernels
from overtone.models import materialised
from overtone.models.adapted import AdaptedEmbedding, AdaptedLinear, StepSlot
from overtone.models.adapter_rows import AdapterRows
from overtone.models.adapter_step import AdapterStep
from overtone.models.lanes import Segment
from support.terms import KINDS, RandomTerms

SHAPES = {"wide": (40, 64), "tall": (96, 64), "square": (64, 64)}  # all read the same input
VOCABULARY = 50
CPU = torch.device("cpu")


class Adapter:
    """deltas: as the engine takes them; dense: module -> delta_W (p, q) float64."""

    def __init__(self, deltas: Mapping[str, Delta], weights: Mapping[str, torch.Tensor]) -> None:
        self.deltas: Mapping[str, ResidentDelta] = make_resident("x", "x", deltas).deltas
        self.dense = {name: reference.dense_delta(delta, weights[name]) for name, delta in deltas.items()}


class Layers:
    """Linear layers on one input and an embedding, adapted."""

    def __init__(self, dtype: torch.dtype = torch.float32, native: NativeKernels | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.plain = {name: nn.Linear(q, p, dtype=dtype) for name, (p, q) in SHAPES.items()}
            self.table = nn.Embedding(VOCABULARY, 64, dtype=dtype)
        self.weights = {name: layer.weight.detach() for name, layer in self.plain.items()}
        self.weights["table"] = self.table.weight.detach().T
        self.slot = StepSlot(native=native)
        self.adapted = {name: AdaptedLinear(name, layer, self.slot) for name, layer in self.plain.items()}
        self.embedding = AdaptedEmbedding("table", self.table, self.slot)
        self._frames, self.kept = FrameBank(CPU, native), AdapterRows(CPU, native=native)

    def adapter(self, kinds: Mapping[str, Sequence[str]], seed: int) -> Adapter:
        deltas = {}
        for name, wanted in kinds.items():
            terms = RandomTerms(SHAPES[name], seed)
            deltas[name] = Delta(tuple(terms.make(kind) for kind in wanted), SHAPES[name])
        return Adapter(deltas, self.weights)

    def step(self, decodes: Sequence[Adapter | None], prompts: Sequence[tuple[int, Adapter | None]]) -> AdapterStep:
        segments = [Segment(1, a.deltas if a else None) for a in decodes]
        chunks = [Segment(n, a.deltas if a else None) for n, a in prompts]
        return AdapterStep(segments, chunks, self._frames, self.kept)

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, step: AdapterStep) -> dict[str, torch.Tensor]:
        self.slot.step = step
        return {name: layer(x)[0] for name, layer in self.adapted.items()}

    def merged(self, x: torch.Tensor, adapter: Adapter | None, name: str) -> torch.Tensor:
        layer = self.plain[name]
        weight = layer.weight.detach().double() + (adapter.dense.get(name, 0.0) if adapter else 0.0)
        return x.double() @ weight.T + layer.bias.detach().double()


def inputs(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(seed))


def check(layers: Layers, decodes: list[Adapter | None], prompts: list[tuple[int, Adapter | None]]) -> None:
    rows = [*decodes, *(adapter for n, adapter in prompts for _ in range(n))]
    for seed in (1, 2):  # another pass of the same batch reuses its plans
        x = inputs(len(rows), seed)
        for name, y in layers(x, layers.step(decodes, prompts)).items():
            for row, adapter in enumerate(rows):
                expected = layers.merged(x[0, row], adapter, name)
                torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=4e-5, msg=f"{name} row {row}")


@pytest.fixture(params=["torch", "native", "materialised"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layers:
    """By torch's operators, by native kernels, and with a dense delta for every sparse core of a prompt."""
    if request.param == "materialised":
        monkeypatch.setattr(materialised, "pays", lambda term, shape, tokens, cost: True)
        monkeypatch.setattr(materialised.Materialised, "may_serve", lambda self, tokens, inputs: True)
    return Layers(native=None if request.param == "torch" else native_kernels())


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone(kind: str, layers: Layers) -> None:
    first, second = (layers.adapter({name: [kind] for name in SHAPES}, seed) for seed in (1, 2))
    check(layers, [first, None, second, first], [(3, second), (2, None), (4, first)])
    check(layers, [first], [])
    check(layers, [], [(5, second)])


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_term_that_reads_the_output(kind: str, layers: Layers) -> None:
    """DoRA's frame is the layer's own output: other terms must not have changed it yet, in whatever order they come."""
    for kinds in ([kind, "weight"], ["weight", kind]):
        adapter = layers.adapter(dict.fromkeys(SHAPES, kinds), 1)
        check(layers, [adapter], [(5, adapter), (2, None)])


def test_all_kinds_at_once(layers: Layers) -> None:
    rows = [layers.adapter({name: [kind] for name in SHAPES}, i) for i, kind in enumerate(KINDS)]
    prompts: list[tuple[int, Adapter | None]] = [(1 + i % 3, adapter) for i, adapter in enumerate(rows)]
    check(layers, [*rows, None], [*prompts, (2, None)])


def test_each_row_equals_its_row_alone(layers: Layers) -> None:
    adapters = [layers.adapter({name: [kind] for name in SHAPES}, i) for i, kind in enumerate(KINDS)]
    x = inputs(len(adapters), 3)
    together = layers(x, layers.step(adapters, []))
    for row, adapter in enumerate(adapters):
        alone = layers(x[:, row : row + 1], layers.step([adapter], []))
        for name in SHAPES:
            torch.testing.assert_close(together[name][row], alone[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int, layers: Layers) -> None:
    """Adapters of several terms, also of one kind twice, on some of the layers, several rows of one adapter."""
    rng = random.Random(seed)
    pool = [
        layers.adapter(
            {name: rng.choices(list(KINDS), k=rng.randint(1, 4)) for name in SHAPES if rng.random() < 0.7},
            seed * 10 + i,
        )
        for i in range(5)
    ]
    choices = [None, *pool]
    decodes = rng.choices(choices, k=rng.randint(0, 7))
    prompts = [(rng.randint(1, 5), adapter) for adapter in rng.choices(choices, k=rng.randint(0, 4))]
    check(layers, decodes, prompts or [(1, pool[0])])


def test_bfloat16_layers() -> None:
    """The delta is summed in float32 and rounded once, with the layer's own output: half a unit in the last place each."""
    layers = Layers(torch.bfloat16)
    kinds = [kind for kind in KINDS if kind != "weight"]  # which multiplies an output that is rounded already
    adapters = [layers.adapter({name: [kind] for name in SHAPES}, i) for i, kind in enumerate(kinds)]
    x = inputs(len(adapters), 4).bfloat16()
    for name, y in layers(x, layers.step(adapters, [])).items():
        for row, adapter in enumerate(adapters):
            plain = layers.merged(x[0, row], None, name)
            exact = layers.merged(x[0, row], adapter, name)
            bound = 2**-8 * (plain.abs() + exact.abs()) + 1e-2 * 2**-8
            assert bool(((y[row].double() - exact).abs() <= bound).all())


def test_embedding() -> None:
    """A low-rank core on one-hot inputs, and one that scales the table's own rows."""
    layers = Layers()
    generator = torch.Generator().manual_seed(5)
    shape = (64, VOCABULARY)
    adapters: list[Adapter | None] = [None]
    for rank in (1, 3):
        a, b = torch.randn(rank, VOCABULARY, generator=generator), torch.randn(64, rank, generator=generator)
        gain = torch.randn(64, generator=generator)
        low = Term(IDENTITY, LowRankCore(a, b, 0.5), IDENTITY, gain)
        scaled = Term(WEIGHT, DiagonalCore(gain - 1), IDENTITY)
        adapters.append(Adapter({"table": Delta((scaled, low), shape)}, layers.weights))
    ids = torch.tensor([[3, 3, 49, 0, 7, 7, 3]])
    rows = [adapters[1], adapters[0], adapters[2], *[adapters[2]] * 2, *[adapters[1]] * 2]
    layers.slot.step = layers.step(rows[:3], [(2, adapters[2]), (2, adapters[1])])
    with torch.inference_mode():
        y = layers.embedding(ids)[0]
    for row, adapter in enumerate(rows):
        table = layers.weights["table"].double() + (adapter.dense["table"] if adapter else 0.0)
        torch.testing.assert_close(y[row].double(), table[:, ids[0, row]], rtol=0, atol=1e-5)


def test_one_projection_of_two_ranks() -> None:
    """Adapters of a small rank may hold fewer rows of a matrix than others hold of the same."""
    layers = Layers()
    whole = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))[0]

    def adapter(rank: int, rows: int) -> Adapter:
        frame = projection(SharedMatrix("base-svd:wide", whole[:rows].clone()))
        core = DenseCore(torch.randn(40, rank, generator=torch.Generator().manual_seed(rank)) * 0.1)
        return Adapter({"wide": Delta((Term(frame, core, IDENTITY),), (40, 64))}, layers.weights)

    small, large = adapter(4, 8), adapter(20, 32)
    for decodes in ([small, large], [large, small], [None, small]):
        check(layers, list(decodes), [(2, large), (1, small)])
        check(layers, list(decodes), [(2, small), (1, large)])
