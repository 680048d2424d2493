"""`sparse_core`: coordinates in any order become unique, sorted ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.kernels import DCT, Delta, Term, reference, sparse_core

coordinates = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(-8, 8)), max_size=40)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(coordinates)
def test_any_order_any_duplicates(entries: list[tuple[int, int, int]]) -> None:
    dense = torch.zeros(4, 6, dtype=torch.float64)
    for row, col, value in entries:
        dense[row, col] += value
    rows, cols, values = (torch.tensor([e[i] for e in entries]) for i in range(3))
    core = sparse_core(rows.long(), cols.long(), values.float(), (4, 6))
    assert torch.equal(reference.sparse_dense(core), dense)
    places = list(zip(core.rows.tolist(), core.cols.tolist(), strict=True))
    assert places == sorted({(row, col) for row, col, _ in entries})
    assert (core.rows.dtype, core.cols.dtype, core.values.dtype) == (torch.int32, torch.int32, torch.float32)
    assert core.nnz == len(places)


def test_duplicates_add_in_float64() -> None:
    # In float32, 1e8 + 1 is 1e8 and the sum would be 0.
    values = torch.tensor([1e8, 1.0, -1e8], dtype=torch.float32)
    core = sparse_core(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]), values, (2, 3))
    assert core.values.tolist() == [1.0]
    assert (core.rows.tolist(), core.cols.tolist()) == ([1], [2])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_large_shapes_do_not_overflow(dtype: torch.dtype) -> None:
    # 30000 * 120000 + 119999 needs more than 31 bits.
    rows = torch.tensor([29999, 0], dtype=dtype)
    cols = torch.tensor([119999, 7], dtype=torch.int64)
    core = sparse_core(rows, cols, torch.tensor([1.0, 2.0]), (30000, 120000))
    assert core.rows.tolist() == [0, 29999]
    assert core.cols.tolist() == [7, 119999]
    assert core.values.tolist() == [2.0, 1.0]


def test_one_coefficient() -> None:
    core = sparse_core(torch.tensor([0]), torch.tensor([4]), torch.tensor([3.0]), (2, 5))
    delta = Delta((Term(DCT, core, DCT),), (2, 5))
    # It is one outer product of a row of each frame.
    expected = 3 * torch.outer(reference.dct_matrix(2)[0], reference.dct_matrix(5)[4])
    torch.testing.assert_close(reference.dense_delta(delta), expected)
