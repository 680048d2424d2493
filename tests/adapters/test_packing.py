"""Adapters of sparse cores in memory: packed, what they have in common there once, counted as they are; others as before."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping
from functools import partial

import pytest
import torch

from overtone.adapters.packing import pack_deltas
from overtone.adapters.residency import Residency
from overtone.adapters.resident import ResidentAdapter, SharedOnDevice, make_resident, mix, resident_nbytes
from overtone.kernels import (
    DCT,
    DFT,
    IDENTITY,
    CsrCore,
    Delta,
    LowRankCore,
    PackedDeltas,
    SharedMatrix,
    SparseCore,
    Term,
    projection,
    reference,
    sparse_pattern,
)
from support.cores import random_core

SHAPES = {"a": (12, 20), "b": (8, 20), "c": (12, 20)}


def adapter(seed: int, *, key: str = "", terms: int = 1, names: str = "abc", entries: int = 6) -> dict[str, Delta]:
    """key: of the locations, which then do not depend on the seed."""
    deltas = {}
    values = torch.Generator().manual_seed(seed)
    for name in names:
        (p, q), found = SHAPES[name], []
        for number in range(terms):
            places = torch.Generator().manual_seed(number if key else 100 * seed + ord(name) + number)
            at = torch.randperm(p * q, generator=places)[:entries]
            pattern, _ = sparse_pattern(at // q, at % q, (p, q), f"{key} {number}" if key else "")
            found.append(Term(DCT, SparseCore(pattern, torch.randn(entries, generator=values)), DCT))
        deltas[name] = Delta(tuple(found), SHAPES[name])
    return deltas


def dense(resident: ResidentAdapter, name: str) -> torch.Tensor:
    """delta_W of a layer, float64."""
    p, q = SHAPES[name]
    total = torch.zeros(p, q, dtype=torch.float64)
    for term in resident.deltas[name].terms:
        into, out = (reference.frame_matrix(frame, n, n) for frame, n in ((term.analysis, q), (term.synthesis, p)))
        assert isinstance(term.core, CsrCore)
        total += out.T @ term.core.matrix.to_dense().double() @ into
    return total


def check(resident: ResidentAdapter, deltas: Mapping[str, Delta]) -> None:
    assert list(resident.deltas) == list(deltas)
    for name, delta in deltas.items():
        torch.testing.assert_close(dense(resident, name), reference.dense_delta(delta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["", "seed"])
@pytest.mark.parametrize("terms", [1, 3])
def test_a_packed_adapter_is_the_same_adapter(key: str, terms: int) -> None:
    deltas = adapter(1, key=key, terms=terms)
    made = make_resident("d", "loca", deltas)
    assert isinstance(made.deltas, PackedDeltas)
    assert made.nbytes == resident_nbytes(deltas) == made.deltas.nbytes
    check(made, deltas)


def test_what_adapters_share_is_there_once() -> None:
    place = SharedOnDevice()
    one, other = (make_resident(str(i), "loca", adapter(i, key="seed"), place) for i in range(2))
    own = make_resident("own", "loca", adapter(2), place)
    assert isinstance(one.deltas, PackedDeltas)
    assert isinstance(other.deltas, PackedDeltas)
    assert isinstance(own.deltas, PackedDeltas)
    assert one.deltas.layout is other.deltas.layout
    assert one.deltas.patterns is other.deltas.patterns
    # "a" and "c" have one shape, and so one pattern.
    assert one.deltas.patterns.nbytes == 2 * 8 * 6
    assert one.shared == other.shared
    assert sum(one.shared.values()) == one.deltas.layout.nbytes + one.deltas.patterns.nbytes
    assert own.nbytes == one.nbytes + own.deltas.patterns.nbytes
    residency = Residency(1 << 20)
    for made in (one, other):
        residency.retain(made.digest)
        residency.load(made.digest, made.nbytes, partial(lambda loaded: loaded, made))
    assert residency.stats(2).resident_bytes == one.nbytes + other.nbytes + sum(one.shared.values())


def test_what_nobody_uses_is_gone() -> None:
    place = SharedOnDevice()
    made = make_resident("d", "loca", adapter(1, key="seed"), place)
    assert len(place.packed.layouts) == len(place.packed.patterns) == 1
    del made
    gc.collect()
    assert len(place.packed.layouts) == len(place.packed.patterns) == 0


def test_a_core_of_many_modules_is_there_once() -> None:
    core = random_core((12, 20), 6, torch.Generator().manual_seed(0))
    packed = pack_deltas({name: Delta((Term(IDENTITY, core, IDENTITY),), (12, 20)) for name in "ac"})
    assert packed is not None
    assert packed.numbers.numel() == packed.patterns.rows.numel() == 6


def pair() -> Term:
    return Term(IDENTITY, LowRankCore(torch.ones(2, 20), torch.ones(12, 2)), IDENTITY)


@pytest.mark.parametrize(
    "changed",
    [
        lambda term: Term(term.analysis, term.core, term.synthesis, torch.ones(12)),
        lambda term: Term(projection(SharedMatrix("m", torch.ones(20, 20))), term.core, IDENTITY),
        lambda term: pair(),
    ],
    ids=["gain", "matrix", "pair"],
)
def test_what_is_not_packed(changed: object) -> None:
    deltas = adapter(1)
    (term,) = deltas["a"].terms
    assert callable(changed)
    deltas["a"] = Delta((changed(term),), SHAPES["a"])
    made = make_resident("d", "x", deltas)
    assert not isinstance(made.deltas, PackedDeltas)
    assert made.nbytes == resident_nbytes(deltas)
    assert pack_deltas({}) is None


@pytest.mark.parametrize("key", ["", "seed"])
def test_mixes_of_packed_adapters(key: str) -> None:
    """In one layout with the same locations the sum is packed, else made module by module."""
    place = SharedOnDevice()
    parts = [make_resident(str(i), "loca", adapter(i, key=key), place) for i in range(3)]
    mixed = mix("m", [(0.5, parts[0]), (-2.0, parts[1]), (1.5, parts[2])])
    assert isinstance(mixed.deltas, PackedDeltas) is bool(key)
    for name in SHAPES:
        expected = 0.5 * dense(parts[0], name) - 2 * dense(parts[1], name) + 1.5 * dense(parts[2], name)
        torch.testing.assert_close(dense(mixed, name), expected, rtol=1e-5, atol=1e-5)
    one_by_one = mix("m", [(0.5, parts[0]), (1.0, make_resident("x", "x", {"b": adapter(9)["b"]}, place))])
    torch.testing.assert_close(dense(one_by_one, "a"), 0.5 * dense(parts[0], "a"), rtol=1e-5, atol=1e-5)


def test_mixes_with_adapters_that_are_not_packed() -> None:
    packed = make_resident("p", "loca", adapter(1))
    plain = make_resident("l", "lora", {"a": Delta((pair(),), SHAPES["a"])})
    terms = mix("m", [(2.0, packed), (1.0, plain)]).deltas["a"].terms
    assert [type(term.core).__name__ for term in terms] == ["CsrCore", "PreparedLowRank"]


def test_frames_decide_the_layout() -> None:
    place = SharedOnDevice()
    layouts = set()
    for frame, size in ((DCT, (12, 20)), (DFT, (14, 22)), (IDENTITY, (12, 20)), (DCT, (12, 20))):
        core = random_core(size, 6, torch.Generator().manual_seed(0))
        packed = pack_deltas({"a": Delta((Term(frame, core, frame),), SHAPES["a"])}, place.packed)
        assert packed is not None
        layouts.add(packed.layout)
        if frame is IDENTITY:
            kept = packed
    assert len(layouts) == 3
    assert kept.layout in layouts


def test_what_an_adapter_in_memory_takes_beside_its_numbers() -> None:
    """Of Python's memory, whose part is all but torch's buffers: a fixed sum, however many modules it has."""
    place, count = SharedOnDevice(), 50
    names = [f"model.layers.{layer}.{part}" for layer in range(32) for part in "qv"]
    cores = [random_core((12, 20), 6, torch.Generator().manual_seed(seed)) for seed in range(len(names))]
    deltas = {name: Delta((Term(DCT, core, DCT),), (12, 20)) for name, core in zip(names, cores, strict=True)}
    first = make_resident("first", "loca", deltas, place)  # with the layout
    gc.collect()
    tracemalloc.start()
    kept = [make_resident(f"{i:064}", "loca", deltas, place) for i in range(count)]
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    buffers = 12 * 6 * len(names)
    beside = first.nbytes - buffers
    assert all(one.nbytes == first.nbytes for one in kept)
    assert taken < count * beside
    assert beside < 4096
