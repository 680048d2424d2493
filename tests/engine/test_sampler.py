"""The sampler against brute force, row by row; what one row gets never depends on the others."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.sampler import filtered_probabilities, penalised, sample
from overtone.engine.sequence import Sequence
from overtone.engine.types import SamplingParams
from support.requests import make_sequence

VOCAB = 24


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def tokens(logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [choice.token_id for choice in sample(logits, sequences)]


def draw(logits: torch.Tensor, sequence: Sequence, count: int) -> list[int]:
    """`count` tokens for one sequence from the same logits; its output is left empty."""
    drawn = [sample(logits[None], [sequence])[0].token_id for _ in range(count)]
    assert None not in drawn
    return [token for token in drawn if token is not None]


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """The filters by the definitions in generation.proto, in plain Python; not renormalised."""
    largest = max(logits)
    weights = [math.exp((value - largest) / params.temperature) for value in logits]
    by_rank = sorted(range(len(logits)), key=lambda i: -logits[i])
    if params.top_k:
        weights = [w if i in by_rank[: params.top_k] else 0.0 for i, w in enumerate(weights)]
    total = math.fsum(weights)
    weights = [w / total for w in weights]
    if params.top_p < 1.0:
        # The smallest set of likeliest tokens that reaches top_p.
        kept, mass = set(), 0.0
        for i in by_rank:
            if mass >= params.top_p:
                break
            kept.add(i)
            mass += weights[i]
        weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    return [w if w >= params.min_p * max(weights) else 0.0 for w in weights]


def test_greedy() -> None:
    logits = random_logits(5)
    chosen = tokens(logits, [make_sequence() for _ in range(5)])
    assert chosen == [max(range(VOCAB), key=row.__getitem__) for row in logits.tolist()]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    values=st.lists(st.integers(-400, 400), min_size=2, max_size=VOCAB, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.021, 0.37, 1.0]),
)
def test_filters(values: list[int], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = [value / 100 for value in values]
    params = SamplingParams(temperature, top_k, top_p, min_p)
    got = filtered_probabilities(torch.tensor(logits), params)
    torch.testing.assert_close(
        got.double(), torch.tensor(brute_force(logits, params), dtype=torch.float64), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.01}], ids=lambda o: next(iter(o))
)
def test_the_tightest_filter_is_greedy(options: dict[str, float]) -> None:
    logits = random_logits(6, seed=2)
    sampling = {"temperature": 1.0, **options}
    sequences = [make_sequence(seed=i, **sampling) for i in range(6)]
    assert tokens(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = random_logits(1, seed=3)[0]
    sequence = make_sequence(prompt_ids=(3, 3, 5), repetition_penalty=penalty)
    sequence.output_ids += [7, 3]
    before = logits.clone()
    expected = logits.tolist()
    for token in {3, 5, 7}:
        expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
    torch.testing.assert_close(penalised(logits, sequence), torch.tensor(expected))
    assert torch.equal(logits, before)
    assert tokens(logits[None], [sequence]) == [max(range(VOCAB), key=expected.__getitem__)]


def test_repetition_penalty_changes_the_greedy_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 9]] = torch.tensor([2.0, 1.5])
    assert tokens(logits, [make_sequence(prompt_ids=(4,))]) == [4]
    assert tokens(logits, [make_sequence(prompt_ids=(4,), repetition_penalty=2.0)]) == [9]


def test_seed_alone_decides() -> None:
    """The same request gets the same tokens alone, in a crowd, and in any row of it."""
    steps = [random_logits(1, seed=100 + i)[0] for i in range(20)]

    def generate(row: int, crowd: int) -> list[int]:
        mine = make_sequence(seed=77, temperature=1.5)
        others = [make_sequence(seed=i, temperature=0.7 * (i % 3), top_k=i) for i in range(crowd)]
        sequences = [*others[:row], mine, *others[row:]]
        chosen = []
        for i, step in enumerate(steps):
            logits = random_logits(crowd + 1, seed=i)
            logits[row] = step
            chosen.append(tokens(logits, sequences)[row])
        return [token for token in chosen if token is not None]

    alone = generate(0, 0)
    assert len(set(alone)) > 3
    assert generate(0, 4) == alone
    assert generate(4, 4) == alone
    assert generate(2, 6) == alone


def test_seeds_differ() -> None:
    logits = torch.zeros(VOCAB)
    by_seed = {seed: tuple(draw(logits, make_sequence(seed=seed, temperature=1.0), 12)) for seed in range(20)}
    assert len(set(by_seed.values())) == 20
    assert by_seed[3] == tuple(draw(logits, make_sequence(seed=3, temperature=1.0), 12))


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1, 2**64 - 1])
def test_any_64_bit_seed(seed: int) -> None:
    assert len(draw(torch.zeros(VOCAB), make_sequence(seed=seed, temperature=1.0), 3)) == 3


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 2.0, "top_k": 6}, {"temperature": 0.8, "top_p": 0.8, "min_p": 0.02}],
    ids=["plain", "top_k", "top_p and min_p"],
)
def test_distribution(options: dict[str, float]) -> None:
    """Pearson's chi-square over 3000 draws stays below what chance exceeds once in 10^6; fixed seed."""
    logits, count = random_logits(1, seed=5)[0], 3000
    weights = brute_force(logits.tolist(), SamplingParams(**options))  # type: ignore[arg-type]
    expected = [count * w / math.fsum(weights) for w in weights]
    seen = Counter(draw(logits, make_sequence(seed=11, **options), count))
    assert all(expected[token] > 0 for token in seen)
    # Cells too thin for the approximation are pooled.
    cells = [(seen[i], e) for i, e in enumerate(expected) if e >= 5]
    cells.append((count - sum(s for s, _ in cells), max(count - sum(e for _, e in cells), 1e-9)))
    chi_square = sum((s - e) ** 2 / e for s, e in cells if e >= 1)
    freedom = len(cells) - 1
    assert chi_square < freedom + 7 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    logits = random_logits(4, seed=6)
    healthy = tokens(logits, [make_sequence(seed=i, temperature=float(i % 2)) for i in range(4)])
    logits[1] = bad  # all of a row -inf leaves nothing to choose from either
    logits[2, 3] = math.nan
    sequences = [make_sequence(seed=i, temperature=float(i % 2), logprobs=True) for i in range(4)]
    choices = sample(logits, sequences)
    assert [choice.token_id for choice in choices] == [healthy[0], None, None, healthy[3]]
    assert [choice.logprob is None for choice in choices] == [False, True, True, False]


def test_single_minus_infinity_is_never_chosen() -> None:
    logits = torch.zeros(VOCAB)
    logits[:-2] = -math.inf
    drawn = draw(logits, make_sequence(seed=1, temperature=1.0, repetition_penalty=1.5), 200)
    assert set(drawn) == {VOCAB - 2, VOCAB - 1}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 5, "repetition_penalty": 1.2}])
def test_logprobs_and_ranks(options: dict[str, float]) -> None:
    """Those of the model at temperature 1, before any filter, whatever was done to choose."""
    logits = random_logits(3, seed=8)
    sequences = [make_sequence(seed=4 + i, logprobs=True, top_n=4, **options) for i in range(3)]
    expected = torch.log_softmax(logits.double(), -1)
    for row, choice in enumerate(sample(logits, sequences)):
        assert choice.token_id is not None
        assert choice.logprob is not None
        by_rank = sorted(range(VOCAB), key=lambda i, row=row: -float(expected[row, i]))
        assert choice.logprob.logprob == pytest.approx(float(expected[row, choice.token_id]), abs=1e-5)
        assert choice.logprob.rank == by_rank.index(choice.token_id) + 1
        assert [top.token_id for top in choice.logprob.top] == by_rank[:4]
        assert [top.logprob for top in choice.logprob.top] == pytest.approx(
            [float(expected[row, i]) for i in by_rank[:4]], abs=1e-5
        )


def test_logprobs_only_when_asked() -> None:
    plain, own, top = sample(random_logits(3), [make_sequence(), make_sequence(logprobs=True), make_sequence(top_n=2)])
    assert plain.logprob is None
    assert own.logprob is not None
    assert own.logprob.top == ()
    assert top.logprob is not None
    assert len(top.logprob.top) == 2
