"""Dense cores of a batch as batched products, against each core by itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from overtone.kernels import StackedRows, stackable
from overtone.kernels.prepared import PreparedCore, PreparedDense, PreparedDiagonal, PreparedKronecker, PreparedLowRank

Q, P = 14, 10


def low_rank(rank: int, generator: torch.Generator) -> PreparedLowRank:
    return PreparedLowRank(torch.randn(rank, Q, generator=generator), torch.randn(rank, P, generator=generator))


def dense(size: int, generator: torch.Generator) -> PreparedDense:
    return PreparedDense(torch.randn(P, size, generator=generator))


def diagonal(size: int, generator: torch.Generator) -> PreparedDiagonal:
    return PreparedDiagonal(torch.randn(size, generator=generator))


MAKERS: dict[str, Callable[[int, torch.Generator], PreparedCore]] = {
    "low-rank": low_rank,
    "dense": dense,
    "diagonal": diagonal,
}


def one_by_one(z: torch.Tensor, cores: list[PreparedCore | None], width: int) -> torch.Tensor:
    result = torch.zeros(len(z), width)
    for row, core in enumerate(cores):
        if core is not None:
            u = core.apply(z[row : row + 1])[0]
            result[row, : len(u)] = u
    return result


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_follow_a_changing_batch(kind: str) -> None:
    choice, generator = random.Random(kind), torch.Generator().manual_seed(1)
    pool = [MAKERS[kind](size, generator) for size in (1, 4, 4, 7, 7)]
    rows = StackedRows()
    cores: list[PreparedCore | None] = [pool[1]]
    for step in range(50):
        if choice.random() < 0.3:
            cores = [choice.choice([None, *pool]) for _ in range(choice.randrange(1, 12))]
        cores[choice.randrange(len(cores))] = choice.choice(pool)
        z = torch.randn(len(cores), Q, generator=torch.Generator().manual_seed(step))
        rows.update(cores)  # type: ignore[arg-type]
        u = rows.apply(z)
        torch.testing.assert_close(u, one_by_one(z, cores, u.shape[1]), rtol=0, atol=1e-5)


def test_one_hot_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    cores: list[PreparedCore | None] = [low_rank(3, generator), None, low_rank(2, generator)]
    rows = StackedRows()
    rows.update(cores)  # type: ignore[arg-type]
    ids = torch.tensor([5, 0, 13])
    u = rows.apply(ids)
    torch.testing.assert_close(u, one_by_one(torch.eye(Q)[ids], cores, P), rtol=0, atol=1e-6)


def test_what_is_stacked() -> None:
    generator = torch.Generator().manual_seed(1)
    small, large = low_rank(1, generator), low_rank(32, generator)
    everything = 1 << 30
    assert stackable([small, None, small], everything)
    assert stackable([large, large], everything)
    assert not stackable([None], everything)
    assert not stackable([small] * 7 + [large], everything), "padding eight rows to the largest"
    assert not stackable([large, large], 4 * 2 * 32 * (P + Q) - 1)
    assert stackable([large, large], 4 * 2 * 32 * (P + Q))
    assert not stackable([small, dense(3, generator)], everything)
    kronecker = PreparedKronecker(torch.ones(2, 1), torch.ones(1, 2), torch.ones(7, 7))
    assert not stackable([kronecker], everything)
