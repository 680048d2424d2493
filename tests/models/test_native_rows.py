"""Terms that native kernels add: which rows are counted how, and what is kept of adapters from step to step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from overtone.kernels import FrameBank
from overtone.kernels.native import NativeKernels, native_kernels
from overtone.models import materialised
from overtone.models.adapter_rows import AdapterRows, Output
from overtone.models.adapter_step import AdapterStep
from overtone.models.lanes import Segment
from support.deltas import RandomAdapter, numbers_of, random_adapter

SHAPES = {"wide": (40, 64), "tall": (96, 64), "square": (64, 64)}
CPU = torch.device("cpu")


@pytest.fixture
def native() -> NativeKernels:
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("this machine has no native kernels")
    return kernels


class Steps:
    """Steps on layers that answer nothing themselves."""

    def __init__(self, native: NativeKernels) -> None:
        self.frames, self.kept = FrameBank(CPU, native), AdapterRows(CPU, native=native)

    def __call__(
        self, decodes: Sequence[RandomAdapter], prompts: Sequence[tuple[int, RandomAdapter]], names: Sequence[str]
    ) -> None:
        """Compares every row of the layers `names` with the adapters' dense deltas."""
        rows = [*decodes, *(one for tokens, one in prompts for _ in range(tokens))]
        x = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(len(rows)))
        outputs = [Output(name, torch.zeros(len(rows), SHAPES[name][0])) for name in names]
        step = AdapterStep(
            [Segment(1, one.deltas) for one in decodes],
            [Segment(tokens, one.deltas) for tokens, one in prompts],
            self.frames,
            self.kept,
        )
        step.add(x, *outputs)
        for name, y, _ in outputs:
            for row, one in enumerate(rows):
                expected = torch.zeros(SHAPES[name][0], dtype=torch.float64)
                if name in one.dense:
                    expected = one.dense[name] @ x[row].double()
                torch.testing.assert_close(y[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_counted_where_they_have_a_core(native: NativeKernels) -> None:
    steps = Steps(native)
    wide, every = (random_adapter(SHAPES, names, seed=i) for i, names in enumerate([("wide",), tuple(SHAPES)]))
    steps([wide, every, wide], [(5, wide), (3, every)], list(SHAPES))
    assert steps.kept.paths == {"sparse": 3 + 1 + 1, "prompt": 8 + 3 + 3}


def test_dense_prompts_are_counted_once(native: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of a lane goes by a dense delta, then all of them."""
    monkeypatch.setattr(materialised.Materialised, "may_serve", lambda self, tokens, inputs: tokens > 4)
    monkeypatch.setattr(materialised, "pays", lambda term, shape, tokens, cost: True)
    steps = Steps(native)
    one, other = (random_adapter(SHAPES, ("wide",), seed=i) for i in range(2))
    steps([one], [(5, one), (3, other)], ["wide"])
    assert steps.kept.paths == {"sparse": 1, "prompt": 3, "materialised": 5}
    steps([], [(5, one), (6, other)], ["wide"])
    assert steps.kept.paths == {"sparse": 1, "prompt": 3, "materialised": 16}


@pytest.mark.parametrize("packed", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
def test_modules_that_come_later(native: NativeKernels, packed: tuple[int, ...]) -> None:
    """An adapter that was there before keeps its shorter list of addresses."""
    steps = Steps(native)
    wide, every, tall = (
        random_adapter(SHAPES, names, seed=i, packed=i in packed)
        for i, names in enumerate([("wide",), tuple(SHAPES), ("tall",)])
    )
    for decodes in ([wide], [wide, every], [tall, wide], [every, wide, tall, wide], [wide]):
        steps(decodes, [], list(SHAPES))
        steps(decodes, [(2, wide)], ["wide", "tall"])


@pytest.mark.parametrize("packed", [False, True], ids=["by module", "packed"])
def test_nothing_is_kept_of_an_adapter_that_left(native: NativeKernels, packed: bool) -> None:
    """Of its addresses not beyond the step that no longer asks for them."""
    steps = Steps(native)
    gone, other = (random_adapter(SHAPES, tuple(SHAPES), seed=i, packed=packed) for i in range(2))
    steps([gone, other], [], list(SHAPES))
    numbers = weakref.ref(numbers_of(gone.deltas))
    del gone
    assert numbers() is not None, "the kernels' table has its address"
    steps([other], [], list(SHAPES))
    gc.collect()
    assert numbers() is None
    steps([], [], list(SHAPES))
    steps([], [], list(SHAPES))
    assert not steps.kept.native_cores._tables
