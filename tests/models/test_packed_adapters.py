"""Packed adapters in a batch: what is known of them at once equals what their terms say, and so does what they add."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.adapters.packing import pack_deltas
from overtone.engine.sole_adapter import cost_of
from overtone.kernels import DCT, IDENTITY, Delta, FrameBank, Term, prepare
from overtone.kernels.native import native_kernels
from overtone.models.adapter_rows import AdapterRows, Output
from overtone.models.adapter_step import AdapterStep
from overtone.models.blocked_step import BlockedStep
from overtone.models.channels import AdapterDeltas, Channel, Outlines, PackedTerms
from overtone.models.core_tables import NativeCores
from overtone.models.lanes import Segment
from support.cores import random_core
from support.deltas import Prepared, PreparedTerm

SHAPES = {"wide": (40, 64), "tall": (96, 64), "square": (64, 64)}
CPU = torch.device("cpu")
FRAMES = (DCT, IDENTITY)
Terms = dict[str, list[int]]
"""Module -> the frame of each of its terms, by number."""


def both_forms(modules: Terms, seed: int) -> tuple[AdapterDeltas, AdapterDeltas]:
    """One adapter packed, and by module."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        name: Delta(
            tuple(
                Term(FRAMES[frame], random_core(SHAPES[name], 1 + 7 * i, generator), FRAMES[frame])
                for i, frame in enumerate(frames)
            ),
            SHAPES[name],
        )
        for name, frames in modules.items()
    }
    packed = pack_deltas(deltas)
    assert packed is not None
    plain = {
        name: Prepared(tuple(PreparedTerm(t.analysis, prepare(t.core), t.synthesis) for t in delta.terms))
        for name, delta in deltas.items()
    }
    return packed, plain


def contents(address: Sequence[int]) -> list[tuple[int, int, float]]:
    """What native kernels read there."""
    rows, cols, values, count = (int(n) for n in address)

    def read(at: int, kind: type[ctypes.c_int32 | ctypes.c_float]) -> list[float]:
        return list((kind * count).from_address(at)) if count else []

    places = zip(read(rows, ctypes.c_int32), read(cols, ctypes.c_int32), read(values, ctypes.c_float), strict=True)
    return [(int(row), int(col), value) for row, col, value in places]


some_terms = st.dictionaries(
    st.sampled_from(list(SHAPES)), st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1
)


@given(st.lists(some_terms, min_size=1, max_size=4))
@settings(deadline=None)
def test_outlines_are_those_of_the_terms(adapters: list[Terms]) -> None:
    """The same layout, and tables of addresses with the same contents, whichever came first."""
    outlines, tables = Outlines(), (NativeCores(), NativeCores())
    pairs = [both_forms(modules, seed) for seed, modules in enumerate(adapters)]
    found = outlines.of([one for pair in pairs for one in pair])
    fast, slow = ([one for one in found[start::2] if one is not None] for start in range(2))
    for one, other in zip(fast, slow, strict=True):
        assert one.layout is other.layout
        assert list(one.modules) == list(other.modules)
        for name, channels in one.modules.items():
            assert list(channels) == list(other.modules[name])
            assert channels is one.modules[name], "a term is one object as long as the outline lives"
    channels_of_all: set[Channel] = {c for one in fast for channels in one.layout.modules.values() for c in channels}
    for channel in channels_of_all:
        quick, plain = (table.table(channel, ones) for table, ones in zip(tables, (fast, slow), strict=True))
        assert quick.slots == plain.slots
        assert quick.cores.shape == plain.cores.shape
        for address, other_address in zip(quick.cores.view(-1, 4), plain.cores.view(-1, 4), strict=True):
            assert contents(address.tolist()) == contents(other_address.tolist())


@pytest.mark.parametrize("form", [AdapterStep, BlockedStep])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_mixed_batch_is_bit_for_bit_that_of_ordinary_adapters(
    form: type[AdapterStep | BlockedStep], native: bool
) -> None:
    kernels = native_kernels() if native else None
    if native and kernels is None:
        pytest.skip("this machine has no native kernels")
    modules: list[Terms] = [{"wide": [0], "tall": [0, 0]}, {"wide": [0, 1], "square": [1]}, {"square": [0]}]
    adapters = [both_forms(one, seed) for seed, one in enumerate(modules)]
    frames, tokens = FrameBank(CPU, kernels), [1, 1, 1, 1, 3, 2]
    x = torch.randn(sum(tokens), 64, generator=torch.Generator().manual_seed(0))

    def added(packed: Sequence[bool]) -> list[torch.Tensor]:
        kept = AdapterRows(CPU, native=kernels)
        chosen = [pair[0 if one else 1] for pair, one in zip(adapters, packed, strict=True)]
        segments = [Segment(n, chosen[i]) for n, i in zip(tokens, (0, 1, 2, 0, 2, 1), strict=True)]
        step = form(segments[:4], segments[4:], frames, kept)
        outputs = [Output(name, torch.zeros(len(x), p)) for name, (p, _) in SHAPES.items()]
        step.add(x, *outputs)
        return [y for _, y, _ in outputs]

    expected = added([False, False, False])
    assert all(y.abs().sum() > 0 for y in expected)
    for packed in ([True, False, True], [False, True, False], [True, True, True]):
        for y, other in zip(added(packed), expected, strict=True):
            assert torch.equal(y, other)


@pytest.mark.parametrize("form", [AdapterStep, BlockedStep])
def test_native_kernels_need_no_terms(form: type[AdapterStep | BlockedStep]) -> None:
    """Decoded tokens and short prompts: nothing is made for a module of its own."""
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("this machine has no native kernels")
    kept, frames = AdapterRows(CPU, native=kernels), FrameBank(CPU, kernels)
    for seed in range(3):
        packed, _ = both_forms({name: [0, 0] for name in SHAPES}, seed)
        step = form([Segment(1, packed)], [Segment(3, packed)], frames, kept)
        outputs = [Output(name, torch.zeros(4, p)) for name, (p, _) in SHAPES.items()]
        step.add(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)), *outputs)
        assert all(y.abs().sum() > 0 for _, y, _ in outputs)
        (outline,) = kept.outlines.of([packed])
        assert outline is not None
        assert isinstance(outline.modules, PackedTerms)
        assert not outline.modules._made


def test_what_merging_costs() -> None:
    packed, plain = both_forms({"wide": [0, 1], "tall": [0], "square": [1, 0, 1]}, seed=1)
    assert cost_of(packed, SHAPES) == cost_of(plain, SHAPES)
    assert 0 < cost_of(packed, SHAPES).once < math.inf
    assert cost_of(packed, {"wide": SHAPES["wide"]}).once == math.inf
