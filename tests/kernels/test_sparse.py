"""The sparse core's fast paths against the token-by-token definition, over shapes, sizes and adapter popularity."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels import SparseCore, SparseStep, compress, plan_bags, reference, sparse_core
from overtone.kernels.sparse import apply_bags, apply_segment
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


def apply_by_bags(z: torch.Tensor, cores: list[SparseCore | None], shape: tuple[int, int]) -> torch.Tensor:
    made = {id(core): compress(core) for core in cores if core is not None}
    return apply_bags(z, plan_bags([None if core is None else made[id(core)] for core in cores], shape))


@shapes
@pytest.mark.parametrize("nnz", [1, 2, 5])
def test_compress_keeps_every_entry(shape: tuple[int, int], nnz: int) -> None:
    core = random_core(shape, nnz, torch.Generator().manual_seed(nnz))
    compressed = compress(core)
    assert torch.equal(compressed.matrix.to_dense().double(), reference.sparse_dense(core))
    assert compressed.row_counts.tolist() == [int((core.rows == r).sum()) for r in range(shape[0])]
    assert compressed.shape == shape
    # Row counts and pointers (4 bytes a row), columns and values (8 bytes an entry).
    assert compressed.nbytes == 4 * (2 * shape[0] + 1) + 8 * nnz


@shapes
@pytest.mark.parametrize("pattern", POPULARITY)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_bags(shape: tuple[int, int], pattern: str, tokens: int) -> None:
    pool = many_cores(shape, tokens + 2)
    cores = [pool[a] for a in popular_adapters(pattern, tokens)]
    z = inputs(tokens, shape[1])
    assert_close(apply_by_bags(z, list(cores), shape), reference.sparse_apply(z.double(), cores, shape[0]), scale=5)


@shapes
def test_bags_with_tokens_without_core(shape: tuple[int, int]) -> None:
    a, b, *_ = many_cores(shape, 2)
    cores: list[SparseCore | None] = [None, a, None, None, b, a, None]
    z = inputs(len(cores), shape[1])
    u = apply_by_bags(z, cores, shape)
    assert_close(u, reference.sparse_apply(z.double(), cores, shape[0]), scale=5)
    for token, core in enumerate(cores):
        assert core is not None or not u[token].any()


def test_empty_rows_are_zero() -> None:
    core = sparse_core(torch.tensor([2, 2, 5]), torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 3.0]), (7, 4))
    z = inputs(2, 4)
    for u in (apply_by_bags(z, [core, core], (7, 4)), apply_segment(z, compress(core))):
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
    assert torch.equal(apply_by_bags(z, [empty, empty], (3, 4)), torch.zeros(2, 3))
    other = random_core((3, 4), 5, torch.Generator().manual_seed(0))
    expected = reference.sparse_apply(z.double(), [empty, other], 3)
    assert_close(apply_by_bags(z, [empty, other], (3, 4)), expected)


def test_duplicates_merge_to_their_sum() -> None:
    rows, cols = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 1, 2, 2])
    core = sparse_core(rows, cols, torch.tensor([1.0, 5.0, 2.0, 4.0]), (2, 3))
    assert core.nnz == 2
    z = torch.tensor([[1.0, 10.0, 100.0]])
    assert apply_by_bags(z, [core], (2, 3)).tolist() == [[50.0, 700.0]]
    assert apply_segment(z, compress(core)).tolist() == [[50.0, 700.0]]


STEPS = {
    "decodes": ([0, 1, 2, 0], []),
    "one decode": ([3], []),
    "one prompt": ([], [(4, 1)]),
    "prompt of one token": ([], [(1, 2)]),
    "prompts": ([], [(3, 0), (1, 1), (5, 0)]),
    "mixed": ([0, None, 2], [(4, 1), (2, None), (3, 2)]),
    "mixed, decodes without core": ([None, None], [(2, 1), (3, None)]),
    "mixed, prompts without core": ([1, None, 1], [(2, None), (1, None)]),
    "nothing has a core": ([None], [(2, None)]),
}


@shapes
@pytest.mark.parametrize("name", STEPS)
def test_step(shape: tuple[int, int], name: str) -> None:
    bag_adapters, prompt_adapters = STEPS[name]
    pool = many_cores(shape, 4)
    made = [compress(core) for core in pool]
    bags = [None if a is None else made[a] for a in bag_adapters]
    plan = plan_bags(bags, shape) if any(b is not None for b in bags) else None
    segments = [(length, None if a is None else made[a]) for length, a in prompt_adapters]
    step = SparseStep(plan, len(bags), segments, shape)
    by_token = [*bag_adapters, *(a for length, a in prompt_adapters for _ in range(length))]
    z = inputs(len(by_token), shape[1])
    expected = reference.sparse_apply(z.double(), [None if a is None else pool[a] for a in by_token], shape[0])
    assert step.tokens == len(by_token)
    assert_close(step(z), expected, scale=5)
    assert_close(step(2 * z), 2 * expected, scale=10)  # a step serves every layer of a pass: it keeps nothing


@pytest.mark.parametrize("pattern", POPULARITY)
def test_served_sizes(pattern: str) -> None:
    """A thousand coefficients of a 576 x 1536 layer for a batch of 24."""
    shape = (576, 1536)
    generator = torch.Generator().manual_seed(5)
    pool = [random_core(shape, 1000, generator) for _ in range(24)]
    cores = [pool[a] for a in popular_adapters(pattern, 24)]
    z = inputs(24, shape[1])
    assert_close(apply_by_bags(z, list(cores), shape), reference.sparse_apply(z.double(), cores, shape[0]), scale=5)
