"""Packed adapters against the definition: what each module's views say, where they lie, and what they take."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.kernels import (
    DCT,
    IDENTITY,
    CsrCore,
    PackedDeltas,
    PackedLayout,
    PackedPatterns,
    PackedTerm,
    packed_sum,
    reference,
    sparse_pattern,
)
from overtone.kernels.cores import SparseCore

SHAPES = ((5, 7), (8, 3), (1, 4))
Described = list[tuple[int, int, bool]]
"""Of each term: its shape's number, how many entries, whether it takes the last location and values of its shape again."""


def made(modules: list[Described], seed: int) -> tuple[PackedDeltas, dict[str, list[SparseCore]]]:
    """A packed adapter, and the same cores one by one."""
    generator = torch.Generator().manual_seed(seed)
    layout: dict[str, tuple[PackedTerm, ...]] = {}
    expected: dict[str, list[SparseCore]] = {}
    rows, cols, values = ([torch.zeros(0)] for _ in range(3))
    last: dict[int, tuple[PackedTerm, SparseCore]] = {}
    end = 0
    for number, module in enumerate(modules):
        found = []
        for kind, entries, again in module:
            shape = SHAPES[kind]
            if not again or kind not in last:
                flat = torch.randperm(shape[0] * shape[1], generator=generator)[:entries]
                pattern, _ = sparse_pattern(flat // shape[1], flat % shape[1], shape)
                core = SparseCore(pattern, torch.randn(len(pattern.rows), generator=generator))
                span = slice(end, end + core.nnz)
                end = span.stop
                last[kind] = PackedTerm(DCT, IDENTITY, shape, span, span), core
                for run, part in zip((rows, cols, values), (core.rows, core.cols, core.values), strict=True):
                    run.append(part)
            found.append(last[kind])
        layout[str(number)] = tuple(term for term, _ in found)
        expected[str(number)] = [core for _, core in found]
    places = (torch.cat(run).to(torch.int32) for run in (rows, cols))
    return PackedDeltas(PackedLayout(layout), PackedPatterns(*places), torch.cat(values)), expected


terms = st.tuples(st.integers(0, len(SHAPES) - 1), st.integers(0, 4), st.booleans())


@given(st.lists(st.lists(terms, max_size=3), max_size=5), st.integers(0, 1000))
@settings(deadline=None)
def test_every_module_is_what_lies_in_its_slices(modules: list[Described], seed: int) -> None:
    deltas, expected = made(modules, seed)
    assert list(deltas) == list(expected)
    assert len(deltas) == len(expected)
    for name, cores in expected.items():
        found = deltas[name].terms
        assert len(found) == len(cores)
        for term, core in zip(found, cores, strict=True):
            assert (term.analysis, term.synthesis, term.gain) == (DCT, IDENTITY, None)
            assert isinstance(term.core, CsrCore)
            dense = reference.sparse_dense(core)
            assert torch.equal(term.core.matrix.to_dense().double(), dense)
            z = torch.randn(3, core.shape[1], generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(term.core.apply(z).double(), z.double() @ dense.T, rtol=1e-5, atol=1e-5)
    assert deltas.filled_rows().tolist() == [len(core.rows.unique()) for cores in expected.values() for core in cores]


def test_views_lie_in_the_buffers() -> None:
    deltas, _ = made([[(0, 4, False)], [(1, 3, False)]], seed=1)
    second = deltas["1"].terms[0].core
    assert isinstance(second, CsrCore)
    for view, whole in (
        (second.rows, deltas.patterns.rows),
        (second.cols, deltas.patterns.cols),
        (second.values, deltas.numbers),
        (second.matrix.values(), deltas.numbers),
    ):
        assert view.data_ptr() == whole.data_ptr() + 4 * 4


def test_nothing_is_computed_that_nobody_asks_for() -> None:
    core = made([[(0, 4, False)]], seed=2)[0]["0"].terms[0].core
    assert isinstance(core, CsrCore)
    assert not {"matrix", "pointers"} & (vars(core).keys() | vars(core.pattern).keys())
    assert core.matrix is core.matrix
    assert core.pattern.pointers is core.pattern.pointers


def test_shared_patterns_are_one_object() -> None:
    deltas, _ = made([[(0, 4, False)], [(0, 4, True)]], seed=3)
    shared = PackedPatterns(deltas.patterns.rows, deltas.patterns.cols, "places")
    twins = [PackedDeltas(deltas.layout, shared, torch.full_like(deltas.numbers, i)) for i in range(2)]
    cores = [one[name].terms[0].core for one in twins for name in one]
    assert len({id(core.pattern) for core in cores if isinstance(core, CsrCore)}) == 1
    assert all(core.nbytes == 4 * 4 for core in cores)
    assert shared.nbytes == 8 * 4
    assert twins[0].nbytes == deltas.nbytes - shared.nbytes
    assert twins[0] != twins[1]
    assert len({*twins, twins[0]}) == 2


def test_sum_of_adapters_in_one_layout() -> None:
    deltas, _ = made([[(0, 4, False)], [(1, 2, False)]], seed=4)
    other = PackedDeltas(deltas.layout, deltas.patterns, deltas.numbers.flip(0))
    total = packed_sum([(0.5, deltas), (-2.0, other), (1.0, deltas)])
    assert total is not None
    assert total.layout is deltas.layout
    torch.testing.assert_close(total.numbers, 1.5 * deltas.numbers - 2 * other.numbers)
    elsewhere, _ = made([[(0, 4, False)], [(1, 2, False)]], seed=4)
    assert packed_sum([(1.0, deltas), (1.0, elsewhere)]) is None
    assert packed_sum([(1.0, deltas), (1.0, dict(deltas))]) is None


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        (slice(0, 3), slice(0, 4)),
        (slice(3, 0), slice(3, 0)),
        (slice(-2, 2), slice(0, 4)),
        (slice(0, 4, 2), slice(0, 4, 2)),
    ],
    ids=["lengths", "backwards", "negative", "step"],
)
def test_what_is_no_layout(pattern: slice, values: slice) -> None:
    with pytest.raises(AssertionError):
        PackedLayout({"a": (PackedTerm(DCT, DCT, (5, 7), pattern, values),)})


def test_what_is_no_adapter() -> None:
    layout = PackedLayout({"a": (PackedTerm(DCT, DCT, (5, 7), slice(0, 4), slice(0, 4)),)})
    places, numbers = torch.arange(4, dtype=torch.int32), torch.zeros(4)
    PackedDeltas(layout, PackedPatterns(places, places), numbers)
    for wrong in (numbers[:3], numbers.double(), torch.zeros(8)[::2], numbers[None]):
        with pytest.raises(AssertionError):
            PackedDeltas(layout, PackedPatterns(places, places), wrong)
    with pytest.raises(AssertionError):
        PackedDeltas(layout, PackedPatterns(places[:3], places[:3]), numbers)
    with pytest.raises(AssertionError):
        PackedPatterns(places.long(), places)


def test_what_an_adapter_takes_beside_its_buffers() -> None:
    """Of Python's memory; the buffers are torch's."""
    deltas, _ = made([[(0, 4, False)]] * 64, seed=5)
    patterns = PackedPatterns(deltas.patterns.rows, deltas.patterns.cols, "places")
    count = 100
    gc.collect()
    tracemalloc.start()
    kept = [PackedDeltas(deltas.layout, patterns, torch.zeros(deltas.layout.entries)) for _ in range(count)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < count * (kept[0].nbytes - 4 * deltas.layout.entries)
    assert kept[0].nbytes - 4 * deltas.layout.entries < 4096
