"""The sparse core's fast paths against the token-by-token definition, over shapes, sizes and adapter popularity."""

from __future__ import annotations

import random

import pytest
import torch

from overtone.kernels import SparseCore, SparseRows, SparseTable, compress, reference, sparse_core
from overtone.kernels.native import native_kernels
from overtone.kernels.sparse import apply_segment
from support.cores import POPULARITY, popular_adapters, random_core
from support.tolerances import assert_close

SHAPES = ((6, 6), (24, 10), (10, 24), (1, 7), (7, 1), (96, 64))

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def inputs(tokens: int, q: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, q, generator=torch.Generator().manual_seed(seed))


def many_cores(shape: tuple[int, int], count: int, seed: int = 1) -> list[SparseCore]:
    """Cores of mixed sizes, one entry and full ones among them."""
    generator = torch.Generator().manual_seed(seed)
    full = shape[0] * shape[1]
    sizes = [1, full, max(1, full // 2), min(full, 3)]
    return [random_core(shape, sizes[i % len(sizes)], generator) for i in range(count)]


def new_rows(shape: tuple[int, int], native: bool) -> SparseRows | SparseTable:
    kernels = native_kernels()
    if native and kernels is None:
        pytest.skip("this machine has no native kernels")
    return SparseTable(shape, kernels) if native and kernels else SparseRows(shape, torch.device("cpu"))


def apply_rows(
    z: torch.Tensor, cores: list[SparseCore | None], shape: tuple[int, int], native: bool = False
) -> torch.Tensor:
    made = {id(core): compress(core) for core in cores if core is not None}
    rows = new_rows(shape, native)
    rows.update([None if core is None else made[id(core)] for core in cores])
    return rows.apply(z)


@shapes
@pytest.mark.parametrize("nnz", [1, 2, 5])
def test_compress_keeps_every_entry(shape: tuple[int, int], nnz: int) -> None:
    core = random_core(shape, nnz, torch.Generator().manual_seed(nnz))
    compressed = compress(core)
    assert torch.equal(compressed.matrix.to_dense().double(), reference.sparse_dense(core))
    assert torch.equal(compressed.rows, core.rows)
    assert compressed.shape == shape
    # Pointers (4 bytes a row), coordinates and values (12 bytes an entry).
    assert compressed.nbytes == 4 * (shape[0] + 1) + 12 * nnz


@shapes
@pytest.mark.parametrize("pattern", POPULARITY)
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("native", [False, True])
def test_rows(shape: tuple[int, int], pattern: str, tokens: int, native: bool) -> None:
    pool = many_cores(shape, tokens + 2)
    cores = [pool[a] for a in popular_adapters(pattern, tokens)]
    z = inputs(tokens, shape[1])
    assert_close(
        apply_rows(z, list(cores), shape, native), reference.sparse_apply(z.double(), cores, shape[0]), scale=5
    )


@shapes
def test_rows_with_tokens_without_core(shape: tuple[int, int]) -> None:
    a, b, *_ = many_cores(shape, 2)
    cores: list[SparseCore | None] = [None, a, None, None, b, a, None]
    z = inputs(len(cores), shape[1])
    u = apply_rows(z, cores, shape)
    assert_close(u, reference.sparse_apply(z.double(), cores, shape[0]), scale=5)
    for token, core in enumerate(cores):
        assert core is not None or not u[token].any()


def test_empty_rows_are_zero() -> None:
    core = sparse_core(torch.tensor([2, 2, 5]), torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 3.0]), (7, 4))
    z = inputs(2, 4)
    for u in (apply_rows(z, [core, core], (7, 4)), apply_segment(z, compress(core))):
        assert_close(u, reference.sparse_apply(z.double(), [core, core], 7))
        assert not u[:, [0, 1, 3, 4, 6]].any()
        assert u[:, [2, 5]].all()


@shapes
@pytest.mark.parametrize("tokens", [1, 5])
def test_segment(shape: tuple[int, int], tokens: int) -> None:
    z = inputs(tokens, shape[1])
    for core in many_cores(shape, 4):
        expected = reference.sparse_apply(z.double(), [core] * tokens, shape[0])
        assert_close(apply_segment(z, compress(core)), expected, scale=5)


def test_core_without_entries() -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    empty = sparse_core(nothing, nothing, torch.tensor([]), (3, 4))
    z = inputs(2, 4)
    assert torch.equal(apply_segment(z, compress(empty)), torch.zeros(2, 3))
    assert torch.equal(apply_rows(z, [empty, empty], (3, 4)), torch.zeros(2, 3))
    other = random_core((3, 4), 5, torch.Generator().manual_seed(0))
    expected = reference.sparse_apply(z.double(), [empty, other], 3)
    assert_close(apply_rows(z, [empty, other], (3, 4)), expected)


def test_duplicates_merge_to_their_sum() -> None:
    rows, cols = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 1, 2, 2])
    core = sparse_core(rows, cols, torch.tensor([1.0, 5.0, 2.0, 4.0]), (2, 3))
    assert core.nnz == 2
    z = torch.tensor([[1.0, 10.0, 100.0]])
    assert apply_rows(z, [core], (2, 3)).tolist() == [[50.0, 700.0]]
    assert apply_segment(z, compress(core)).tolist() == [[50.0, 700.0]]


@shapes
@pytest.mark.parametrize("native", [False, True])
def test_rows_follow_a_changing_batch(shape: tuple[int, int], native: bool) -> None:
    """Rows that come, go, shrink, grow and move: always what rows laid out afresh give."""
    generator = random.Random(shape[0])
    pool = many_cores(shape, 6)
    made = [compress(core) for core in pool]
    rows = new_rows(shape, native)
    chosen: list[int | None] = []
    for step in range(60):
        if generator.random() < 0.2:
            chosen = [generator.choice([None, *range(len(pool))]) for _ in range(generator.randrange(1, 14))]
        elif chosen:
            chosen[generator.randrange(len(chosen))] = generator.choice([None, *range(len(pool))])
        rows.update([None if i is None else made[i] for i in chosen])
        z = inputs(len(chosen), shape[1], seed=step)
        expected = reference.sparse_apply(z.double(), [None if i is None else pool[i] for i in chosen], shape[0])
        assert_close(rows.apply(z), expected, scale=5)
        if isinstance(rows, SparseRows) and (end := rows._starts[rows.tokens]):
            assert_close(rows._by_bags(z, end), expected, scale=5)


def test_a_broken_row_stays_alone() -> None:
    """A row of NaN next to others, and next to the room that a smaller core left over."""
    large, small = (random_core((6, 5), n, torch.Generator().manual_seed(n)) for n in (30, 2))
    rows = SparseRows((6, 5), torch.device("cpu"))
    rows.update([compress(large), compress(large)])
    rows.update([compress(small), compress(large)])
    z = inputs(2, 5)
    z[1] = torch.nan
    assert_close(rows.apply(z)[:1], reference.sparse_apply(z[:1].double(), [small], 6), scale=5)


def test_slack_is_taken_back() -> None:
    shape = (20, 30)
    large, small = (compress(random_core(shape, n, torch.Generator().manual_seed(n))) for n in (600, 3))
    rows = SparseRows(shape, torch.device("cpu"))
    rows.update([large] * 4)
    rows.update([small] * 4)
    assert rows._starts[4] <= 2 * 4 * 3 + 4


@pytest.mark.parametrize("pattern", POPULARITY)
@pytest.mark.parametrize("native", [False, True])
def test_served_sizes(pattern: str, native: bool) -> None:
    """A thousand coefficients of a 576 x 1536 layer for a batch of 24."""
    shape = (576, 1536)
    generator = torch.Generator().manual_seed(5)
    pool = [random_core(shape, 1000, generator) for _ in range(24)]
    cores = [pool[a] for a in popular_adapters(pattern, 24)]
    z = inputs(24, shape[1])
    assert_close(
        apply_rows(z, list(cores), shape, native), reference.sparse_apply(z.double(), cores, shape[0]), scale=5
    )


def test_a_failed_update_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (20, 30)
    first, second = (random_core(shape, 9, torch.Generator().manual_seed(n)) for n in (1, 2))
    rows = SparseRows(shape, torch.device("cpu"))
    rows.update([compress(first)] * 2)
    wanted = [compress(first), compress(second)] * 4

    def fail(*sizes: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(rows, "_allocate", fail)
        with pytest.raises(MemoryError):
            rows.update(wanted)
    rows.update(wanted)
    z = inputs(8, 30)
    assert_close(rows.apply(z), reference.sparse_apply(z.double(), [first, second] * 4, 20), scale=5)
