"""Adapted linears in mixed batches equal merged weights; rows without an adapter are the plain layer's, bit by bit."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.engine.scheduler import StepPlan
from overtone.kernels import DCT, FrameBank
from overtone.models.adapted import AdaptedLinear, StepSlot, wrap_layers
from overtone.models.adapter_rows import AdapterRows
from overtone.models.adapter_step import AdapterStep
from overtone.models.lanes import Segment
from support.deltas import RandomAdapter, merge, numbers_of, random_adapter
from support.recorder import Recorder, drip
from support.requests import make_request
from support.tiny import tiny_base, tiny_model

SHAPES = {"wide": (40, 64), "tall": (96, 64), "square": (64, 64)}  # all read the same input
NONE, WIDE, TALL, BOTH, ALL = None, ("wide",), ("tall",), ("wide", "square"), ("wide", "tall", "square")

# Decodes, then prompts (tokens, adapter), by what each adapter touches.
BATCHES = {
    "all adapted": ([ALL, ALL], [(3, ALL)]),
    "mixed": ([ALL, NONE, WIDE, TALL], [(4, NONE), (3, BOTH), (1, WIDE), (2, NONE)]),
    "decodes": ([NONE, BOTH, WIDE], []),
    "prompts": ([], [(2, NONE), (5, TALL)]),
    "one row": ([WIDE], []),
    "adapter only in a prompt": ([NONE, NONE], [(2, ALL), (1, NONE)]),
    "adapter only in a decode": ([NONE, TALL], [(3, NONE)]),
    "adapter without deltas": ([(), ALL, NONE], [(2, ())]),
    "no adapter": ([NONE], [(2, NONE)]),
}


class Layers:
    """Linear layers on one input, adapted."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.plain = {name: nn.Linear(q, p, dtype=dtype) for name, (p, q) in SHAPES.items()}
        self.slot = StepSlot()
        self.adapted = {name: AdaptedLinear(name, layer, self.slot) for name, layer in self.plain.items()}
        self.frames = FrameBank(torch.device("cpu"))
        self.kept = AdapterRows(torch.device("cpu"))

    @torch.inference_mode()
    def __call__(
        self,
        x: torch.Tensor,
        decodes: Sequence[RandomAdapter | None],
        prefills: Sequence[tuple[int, RandomAdapter | None]],
        kept: AdapterRows | None = None,
    ) -> dict[str, torch.Tensor]:
        segments = [Segment(1, a.deltas if a else None) for a in decodes]
        prompts = [Segment(n, a.deltas if a else None) for n, a in prefills]
        step = AdapterStep(segments, prompts, self.frames, kept or self.kept)
        assert step.empty == (not any(a and a.deltas for a in [*decodes, *(a for _, a in prefills)]))
        self.slot.step = step
        try:
            return {name: layer(x) for name, layer in self.adapted.items()}
        finally:
            self.slot.step = None

    def merged(self, x: torch.Tensor, rows: Sequence[RandomAdapter | None], name: str) -> torch.Tensor:
        """Row by row in float64."""
        layer, result = self.plain[name], []
        for row, adapter in zip(x[0].double(), rows, strict=True):
            weight = layer.weight.detach().double() + (adapter.dense.get(name, 0.0) if adapter else 0.0)
            result.append(weight @ row + layer.bias.detach().double())
        return torch.stack(result)[None]


def adapters_for(touched: Sequence[Any]) -> list[RandomAdapter | None]:
    """One adapter a row, each of its own; None where the row has none."""
    return [
        None if names is None else random_adapter(SHAPES, names, nnz=20 + i, seed=i) for i, names in enumerate(touched)
    ]


def batch(name: str) -> tuple[list[RandomAdapter | None], list[tuple[int, RandomAdapter | None]]]:
    decodes, prefills = BATCHES[name]
    adapters = adapters_for([*decodes, *(touched for _, touched in prefills)])
    lengths = [length for length, _ in prefills]
    return adapters[: len(decodes)], list(zip(lengths, adapters[len(decodes) :], strict=True))


def by_row(decodes: Sequence[Any], prefills: Sequence[tuple[int, Any]]) -> list[Any]:
    return [*decodes, *(adapter for length, adapter in prefills for _ in range(length))]


def random_input(rows: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    return torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_equal_merged_weights(name: str) -> None:
    layers, (decodes, prefills) = Layers(), batch(name)
    rows = by_row(decodes, prefills)
    for seed in (1, 2):  # another pass of the same batch reuses its plans
        x = random_input(len(rows), seed=seed)
        for module, y in layers(x, decodes, prefills).items():
            assert y.dtype == x.dtype
            torch.testing.assert_close(y.double(), layers.merged(x, rows, module), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_rows_without_adapter_are_untouched(name: str, dtype: torch.dtype) -> None:
    layers, (decodes, prefills) = Layers(dtype), batch(name)
    rows = by_row(decodes, prefills)
    x = random_input(len(rows), dtype)
    for module, y in layers(x, decodes, prefills).items():
        plain = layers.adapted[module].linear(x)
        for row, adapter in enumerate(rows):
            changed = adapter is not None and module in adapter.dense
            assert torch.equal(y[0, row], plain[0, row]) == (not changed)


@pytest.mark.parametrize("name", BATCHES)
def test_bfloat16_is_rounded_twice(name: str) -> None:
    """Once by the layer and once after the delta, each by at most 2^-8 of the value; the delta itself is float32."""
    layers, (decodes, prefills) = Layers(torch.bfloat16), batch(name)
    rows = by_row(decodes, prefills)
    x = random_input(len(rows), torch.bfloat16)
    for module, y in layers(x, decodes, prefills).items():
        base = layers.merged(x, [None] * len(rows), module)
        whole = layers.merged(x, rows, module)
        bound = 2**-8 * (base.abs() + whole.abs()) + 1e-3
        assert ((y.double() - whole).abs() <= bound).all()


def test_plans_follow_the_batch() -> None:
    """One cache through changing batches gives what a fresh one gives; equal batches share their plans."""
    layers = Layers()
    a, b, c = (random_adapter(SHAPES, names, seed=i) for i, names in enumerate([ALL, WIDE, ALL]))
    sequence = [[a, b], [a, b], [b, a], [a], [a, a], [a, c], [None, a, c], [a, None, c], [b], [None], [a, b]]
    for decodes in sequence:
        x = random_input(len(decodes))
        kept = layers(x, decodes, [])
        fresh = layers(x, decodes, [], kept=AdapterRows(torch.device("cpu")))
        for module, y in kept.items():
            torch.testing.assert_close(y, fresh[module], rtol=0, atol=1e-5)
            torch.testing.assert_close(y.double(), layers.merged(x, decodes, module), rtol=0, atol=1e-4)


def test_only_rows_that_changed_are_prepared_anew() -> None:
    rows = AdapterRows(torch.device("cpu"))
    a, b, c = (random_adapter(SHAPES, ALL, seed=i).deltas for i in range(3))

    def frame_version(*adapters: Any) -> int:
        rows.decodes.update(rows.outlines.of(adapters))
        return rows.decodes.lane(DCT).version

    assert frame_version(a, b) == frame_version(a, b) == 1
    # Another adapter is another adapter, even one that compares equal.
    assert frame_version(a, dict(b)) == 2
    assert frame_version(a) == 3
    # The base model's rows are none of the lane's business, nor where the others then are.
    assert rows.decodes.lane(DCT).rows == [0]
    assert frame_version(None, a, c) == 4
    assert sorted(rows.decodes.lane(DCT).rows) == [1, 2]


@pytest.mark.parametrize("packed", [False, True], ids=["by module", "packed"])
def test_nothing_is_kept_of_an_adapter_that_left(packed: bool) -> None:
    rows = AdapterRows(torch.device("cpu"))
    wide, every = (random_adapter(SHAPES, names, seed=1, packed=packed).deltas for names in (WIDE, ALL))
    rows.decodes.update(rows.outlines.of([wide, every]))
    assert set(rows.decodes.modules) == set(ALL)
    rows.decodes.update(rows.outlines.of([wide, None]))
    assert set(rows.decodes.modules) == set(WIDE)
    gone = weakref.ref(numbers_of(every))
    del every
    assert gone() is None


@pytest.mark.parametrize("packed", [False, True], ids=["by module", "packed"])
def test_a_batch_of_one_adapter_lets_the_others_go(packed: bool) -> None:
    """When all rows come to share a core, the product for many cores goes with the cores that it had."""
    layers, x = Layers(), random_input(9)
    many = [random_adapter(SHAPES, WIDE, nnz=5, seed=i, packed=packed) for i in range(9)]
    gone = weakref.ref(numbers_of(many[0].deltas))
    layers(x, many, [])
    del many
    one = random_adapter(SHAPES, WIDE, nnz=5, seed=99)
    layers(x, [one] * 9, [])
    assert gone() is None


def test_recycled_memory_brings_back_no_plans() -> None:
    """Adapters that die and are born at the same address: the cache must not take one for the other."""
    layers = Layers()
    x = random_input(1)
    for seed in range(30):
        adapter = random_adapter(SHAPES, WIDE, nnz=5, seed=seed)
        y = layers(x, [adapter], [])["wide"]
        torch.testing.assert_close(y.double(), layers.merged(x, [adapter], "wide"), rtol=0, atol=1e-4)
        del adapter


def test_changed_inputs_are_analysed_again() -> None:
    """q, k and v share one analysis; the next layer's input, at whatever address, has its own."""
    layers = Layers()
    adapter = random_adapter(SHAPES, ALL, seed=3)
    with torch.inference_mode():
        layers.slot.step = AdapterStep([Segment(1, adapter.deltas)], [], layers.frames, layers.kept)
        for seed in range(20):
            x = random_input(1, seed=seed)
            for name, layer in layers.adapted.items():
                torch.testing.assert_close(layer(x).double(), layers.merged(x, [adapter], name), rtol=0, atol=1e-4)
            del x


def test_wrapped_layers_keep_their_names_and_weights() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4, bias=False)})})
    weight, bias = (t.detach().clone() for t in model.get_submodule("block.a").parameters())
    wrap_layers(model, ["block.a"], StepSlot())
    wrapped = model.get_submodule("block.a")
    assert isinstance(wrapped, AdaptedLinear)
    assert wrapped.name == "block.a"
    assert torch.equal(wrapped.weight, weight)
    assert wrapped.bias is not None
    assert torch.equal(wrapped.bias, bias)
    assert isinstance(model.get_submodule("block.b"), nn.Linear)
    x = torch.ones(2, 4)
    assert torch.equal(wrapped(x), wrapped.linear(x))


def test_whole_model_equals_merged_models() -> None:
    """Greedy tokens and logits of 14 requests with 4 adapters or none, cramped: those of each adapter merged, alone."""
    base = tiny_base()
    attention = [name for name in base.modules if "self_attn" in name]
    mlp = [name for name in base.modules if "mlp" in name]
    adapters = [
        random_adapter(base.modules, attention, seed=1),
        random_adapter(base.modules, mlp, seed=2),
        random_adapter(base.modules, attention[:1] + mlp[-1:], nnz=300, seed=3),
        random_adapter(base.modules, list(base.modules), nnz=5, seed=4),
        None,
    ]
    config = EngineConfig(max_batch=5, max_step_tokens=9, max_context_tokens=64, page_tokens=4, cache_pages=20)
    runner, recorder = ModelRunner(base, config), Recorder()
    logits: dict[str, list[torch.Tensor]] = {}

    def run(plan: StepPlan) -> torch.Tensor:
        rows = runner.run(plan)
        completed = [chunk.sequence.request.request_id for chunk in plan.chunks if chunk.completes]
        for request_id, row in zip(completed, rows, strict=True):
            logits.setdefault(request_id, []).append(row)
        return rows

    engine = Engine(run, base.codec.decode, base.eos_token_ids, config, recorder)
    owners = [adapters[i * 3 % 5] for i in range(14)]
    requests = [
        make_request(
            f"r{i}",
            [(7 * i + 3 * j) % 255 + 1 for j in range(1 + i * 5 % 23)],
            10,
            ignore_eos=True,
            adapter=owner.deltas if owner else None,
        )
        for i, owner in enumerate(owners)
    ]
    recorder.on_report = drip(engine, requests[6:], every=2)
    for request in requests[:6]:
        engine.submit(request)
    engine.start()
    recorder.wait(*(request.request_id for request in requests))
    engine.stop()
    assert sum(stats.preemptions for stats in recorder.stats) > 0
    assert max(stats.distinct_adapters for stats in recorder.stats) >= 3
    differing = 0
    for request, owner in zip(requests, owners, strict=True):
        tokens = recorder.tokens(request.request_id)
        with torch.inference_mode():
            ids = torch.tensor([[*request.prompt_ids, *tokens[:-1]]])
            expected = merge(tiny_model(), owner)(ids).logits[0, len(request.prompt_ids) - 1 :]
            plain = tiny_model()(ids).logits[0, len(request.prompt_ids) - 1 :]
        assert tokens == expected.argmax(-1).tolist()
        torch.testing.assert_close(torch.stack(logits[request.request_id]), expected, rtol=0, atol=1e-4)
        differing += owner is not None and not torch.equal(plain.argmax(-1), expected.argmax(-1))
    assert differing > 6, "the adapters hardly matter here"
