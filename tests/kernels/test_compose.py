"""Weighted sums of terms equal the weighted sums of their dense deltas, and merge where the frames allow it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from overtone.kernels import Composer, FrameBank, PreparedTerm, Term, prepare, reference
from overtone.kernels.types import FrameKind
from support.terms import KINDS, RandomTerms

SHAPE = (40, 24)
MERGE = {
    "dct",
    "dft",
    "sparse",
    "haar",
    "db2",
    "shared_pattern",
    "low_rank",
    "gained_low_rank",
    "weight",
    "circulant",
    "dense",
    "kronecker",
}
BANK = FrameBank(torch.device("cpu"))
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def prepared(term: Term) -> PreparedTerm:
    return PreparedTerm(term.analysis, prepare(term.core), term.synthesis, term.gain)


def apply(terms: Sequence[PreparedTerm], x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(len(x), SHAPE[0])
    for term in terms:
        product = term.analysis.kind is FrameKind.WEIGHT
        z = x @ WEIGHT.T if product else BANK.analyse(term.analysis, x, term.core.shape[1])
        part = BANK.synthesise(term.synthesis, term.core.apply(z), SHAPE[0])
        y += part if term.gain is None else part * term.gain
    return y


def check(weighted: Sequence[tuple[float, Term]]) -> tuple[PreparedTerm, ...]:
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1))
    total = Composer().compose((weight, prepared(term)) for weight, term in weighted)
    dense = sum(
        (weight * reference.dense_term(term, SHAPE, WEIGHT) for weight, term in weighted),
        torch.zeros(SHAPE, dtype=torch.float64),
    )
    torch.testing.assert_close(apply(total, x).double(), x.double() @ dense.T, rtol=0, atol=1e-5)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind(kind: str) -> None:
    terms = [RandomTerms(SHAPE, seed).make(kind) for seed in range(3)]
    total = check([(0.5, terms[0]), (-2.0, terms[1]), (1.0, terms[2])])
    assert len(total) == (1 if kind in MERGE else 3)


def test_an_adapter_minus_itself_is_nothing() -> None:
    term = RandomTerms(SHAPE, 1).dct()
    (total,) = Composer().compose([(1.0, prepared(term)), (-1.0, prepared(term))])
    assert not apply([total], torch.ones(2, SHAPE[1])).any()


def test_the_parts_stay_as_they_were() -> None:
    """They may be serving other requests."""
    for kind in KINDS:
        parts = [prepared(RandomTerms(SHAPE, seed).make(kind)) for seed in (1, 2)]
        x = torch.randn(2, SHAPE[1])
        before = [apply([part], x) for part in parts]
        Composer().compose([(3.0, parts[0]), (0.5, parts[1])])
        for part, y in zip(parts, before, strict=True):
            assert torch.equal(apply([part], x), y)


@pytest.mark.parametrize("seed", range(10))
def test_any_mixture(seed: int) -> None:
    rng = random.Random(seed)
    terms = RandomTerms(SHAPE, seed)
    check([(rng.uniform(-2, 2), terms.make(kind)) for kind in rng.choices(list(KINDS), k=8)])
