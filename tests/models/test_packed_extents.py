"""Extents of packed adapters, all cores of one shape at once: to the last bit those that are made module by module."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.adapters.packing import pack_deltas
from overtone.kernels import (
    DCT,
    DFT,
    IDENTITY,
    Delta,
    Frame,
    PackedDeltas,
    PackedLayout,
    PackedPatterns,
    PackedTerm,
    Term,
)
from overtone.kernels.gpu import many_placed, records
from overtone.models.device import extents
from overtone.models.device.extents import Packer, Plans
from support.cores import random_core

CPU = torch.device("cpu")
MODULES = {"q": (64, 96), "k": (32, 96), "v": (32, 96), "up": (256, 96), "wide": (32, 8192), "head": (7, 96)}
FRAMES = {"dct": DCT, "dft": DFT, "identity": IDENTITY}


def core_shape(frame: Frame, module: str) -> tuple[int, int]:
    p, q = (frame.coefficients(size) or 0 for size in MODULES[module])
    return p, q


def adapter(chosen: Mapping[str, tuple[str, int]], seed: int = 0) -> PackedDeltas:
    """chosen: module -> frame and number of entries."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for module, (name, entries) in chosen.items():
        frame = FRAMES[name]
        core = random_core(core_shape(frame, module), entries, generator)
        deltas[module] = Delta((Term(frame, core, frame),), MODULES[module])
    packed = pack_deltas(deltas)
    assert packed is not None
    return packed


def check(packer: Packer, packed: PackedDeltas) -> None:
    fast, slow = packer.pack(packed), packer.pack(dict(packed))
    assert (fast is None) == (slow is None)
    if fast is not None and slow is not None:
        assert torch.equal(fast.extent.words, slow.extent.words)
        assert fast.extent.words.dtype == torch.int32
        assert fast.extent.directories == slow.extent.directories
        assert list(fast.extent.directories) == list(slow.extent.directories)
        assert fast.uses is slow.uses
        assert fast.projections == slow.projections == {}


spectral = st.tuples(st.sampled_from(["dct", "dft"]), st.sampled_from([1, 2, 3, 40, 41, 300]))


@given(
    st.dictionaries(st.sampled_from([name for name in MODULES if name != "head"]), spectral, min_size=1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_extents_are_those_of_the_modules(chosen: dict[str, tuple[str, int]], dtype: torch.dtype, seed: int) -> None:
    packer = Packer(MODULES, Plans(dtype, CPU))
    for number in range(2):  # the second finds what is known of the layout
        packed = adapter(chosen, seed + number)
        assert packer.pack(packed) is not None
        check(packer, packed)


@pytest.mark.parametrize(
    "chosen",
    [{"q": ("identity", 3)}, {"q": ("dct", 3), "head": ("dct", 3)}, {"q": ("dct", 3), "v": ("identity", 1)}],
    ids=["frame", "size", "one of two"],
)
def test_what_no_kernel_applies(chosen: dict[str, tuple[str, int]]) -> None:
    packer, packed = Packer(MODULES, Plans(torch.float32, CPU)), adapter(chosen)
    assert packer.pack(packed) is None
    check(packer, packed)


def test_modules_that_the_model_has_not() -> None:
    check(Packer({"k": MODULES["k"]}, Plans(torch.float32, CPU)), adapter({"k": ("dct", 3), "q": ("dct", 3)}))


def test_two_terms_of_a_kind() -> None:
    terms = tuple(PackedTerm(DCT, DCT, MODULES["k"], slice(at, at + 1), slice(at, at + 1)) for at in range(2))
    places = torch.zeros(2, dtype=torch.int32)
    twice = PackedDeltas(PackedLayout({"k": terms}), PackedPatterns(places, places), torch.ones(2))
    check(Packer(MODULES, Plans(torch.float32, CPU)), twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cores_without_entries_and_locations_in_common(dtype: torch.dtype) -> None:
    """Beside others, and alone."""
    places = torch.arange(6, dtype=torch.int32)
    spans = {"k": slice(0, 6), "v": slice(0, 6), "q": slice(2, 2)}
    values = {"k": slice(0, 6), "v": slice(6, 12), "q": slice(12, 12)}
    packer = Packer(MODULES, Plans(dtype, CPU))
    for names in (("k", "v", "q"), ("q",)):
        layout = PackedLayout({n: (PackedTerm(DCT, DCT, MODULES[n], spans[n], values[n]),) for n in names})
        check(packer, PackedDeltas(layout, PackedPatterns(places, places), torch.randn(layout.entries)))


def test_cores_with_more_ends_than_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """High parts, of some of the cores."""
    for module in (many_placed, records):
        monkeypatch.setattr(module, "NARROW", 200)
    check(Packer(MODULES, Plans(torch.float32, CPU)), adapter({"k": ("dct", 400), "v": ("dct", 100)}))
    monkeypatch.undo()
    check(Packer(MODULES, Plans(torch.bfloat16, CPU)), adapter({"wide": ("dct", 66_000), "v": ("dct", 100)}))


def test_very_large_adapters_are_packed_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = adapter({"k": ("dct", 3), "v": ("dct", 3)})
    packer = Packer(MODULES, Plans(torch.float32, CPU))
    monkeypatch.setattr(extents, "MOST_ENTRIES", 5)
    check(packer, packed)
    assert not packer._layouts
