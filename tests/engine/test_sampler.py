"""The sampler against a slow one (support.sampling_oracle); what one row gets never depends on the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.filters import FilterParams, filtered_probabilities
from overtone.engine.guides import Mask
from overtone.engine.sampler import row_maxima, sample
from overtone.engine.sequence import Sequence
from overtone.engine.types import SamplingParams
from overtone.engine.uniforms import uniforms
from overtone.errors import BadSamplingParameter, EngineError
from support.requests import make_sequence
from support.sampling_oracle import changed, intervals, probabilities, uniform

VOCAB = 24


class FixedGuide:
    """Allows the same tokens always."""

    def __init__(self, allowed: set[int], fails: bool = False) -> None:
        self._allowed, self._fails = allowed, fails

    def matcher(self) -> FixedGuide:
        return self

    def follow(self, output_ids: Iterable[int]) -> bool:
        return True

    def fill(self, matchers: Iterable[FixedGuide], rows: Mask) -> list[bool]:
        fixed = list(matchers)
        for matcher, row in zip(fixed, rows, strict=True):
            bits = np.array([token in matcher._allowed for token in range(32 * len(row))])
            row[:] = np.packbits(bits, bitorder="little").view(np.int32)
        return [not matcher._fails for matcher in fixed]


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def tokens(logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [choice.token_id for choice in sample(logits, sequences)]


def draw(logits: torch.Tensor, sequence: Sequence, count: int) -> list[int]:
    """`count` tokens for one sequence from the same logits, which its output grows by."""
    for _ in range(count):
        token = sample(logits[None], [sequence])[0].token_id
        assert token is not None
        sequence.output_ids.append(token)
    return sequence.output_ids


def test_greedy() -> None:
    logits = random_logits(5)
    chosen = tokens(logits, [make_sequence() for _ in range(5)])
    assert chosen == [max(range(VOCAB), key=row.__getitem__) for row in logits.tolist()]


SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.integers(0, VOCAB + 2),
        "top_p": st.sampled_from([0.05, 0.31, 0.77, 0.951, 1.0]),
        "min_p": st.sampled_from([0.0, 0.021, 0.37, 1.0]),
        "typical_p": st.sampled_from([0.1, 0.53, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 4.0]),
        "presence_penalty": st.sampled_from([-1.1, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 1.9]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.25]), max_size=4).map(
            lambda bias: tuple(sorted(bias.items()))
        ),
        "seed": st.integers(0, 2**63 - 1),
        "prompt_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
        "min_new_tokens": st.integers(0, 6),
        "stop_token_ids": st.sampled_from([(), (5,), (1, 7)]),
        "allowed": st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB),
        "output": st.lists(st.integers(0, VOCAB - 1), max_size=6),
    }
)
EOS = frozenset({2})


def mixed_sequence(options: dict[str, Any]) -> Sequence:
    options = dict(options)
    output, allowed = options.pop("output"), options.pop("allowed")
    guide = None if allowed is None else FixedGuide(allowed)
    sequence = make_sequence(max_new_tokens=20, guide=guide, **options)
    sequence.output_ids += output
    return sequence


@settings(deadline=None, derandomize=True, max_examples=100)
@given(rows=st.lists(SAMPLING, min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_mixed_rows_against_the_slow_sampler(rows: list[dict[str, Any]], seed: int) -> None:
    logits = random_logits(len(rows), seed)
    before = logits.clone()
    got = sample(logits, [mixed_sequence(row) for row in rows], EOS)
    assert torch.equal(logits, before)
    for row, choice, values in zip(rows, got, logits.tolist(), strict=True):
        sequence = mixed_sequence(row)
        token = choice.token_id
        assert token is not None
        expected = changed(values, sequence, EOS, row["allowed"])
        if row["temperature"] == 0:
            assert expected[token] >= max(expected) - 1e-4
            continue
        low, high = intervals(probabilities(expected, sequence.request.sampling))[token]
        number = uniform(row["seed"], len(row["output"]))
        # float32 may decide a borderline token of a filter otherwise: then the choice lies beside the interval.
        assert low - 1e-4 <= number <= high + 1e-4 or borderline(expected, sequence.request.sampling)


def borderline(logits: list[float], params: SamplingParams) -> bool:
    """Whether a change of the parameters by rounding errors changes which tokens the filters keep."""
    kept = set()
    for shift in (-1e-5, 1e-5):
        top_p, typical = (p if p == 1.0 else p + shift for p in (params.top_p, params.typical_p))
        moved = replace(params, top_p=top_p, typical_p=typical, min_p=max(0.0, min(1.0, params.min_p * (1 + shift))))
        kept.add(tuple(w > 0 for w in probabilities(logits, moved)))
    return len(kept) > 1


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=st.lists(SAMPLING, min_size=2, max_size=6), seed=st.integers(0, 10**6), wide=st.booleans())
def test_a_row_alone_is_the_row_in_any_batch(rows: list[dict[str, Any]], seed: int, wide: bool) -> None:
    """Token and log-probabilities, bit for bit; `wide`: a vocabulary beyond the first try of the filters."""
    logits = random_logits(len(rows), seed, 1501 if wide else VOCAB)
    for row in rows if wide else ():
        row["allowed"] = None
    together = sample(logits, [mixed_sequence(row | {"top_n": 1 + i}) for i, row in enumerate(rows)], EOS)
    for i, row in enumerate(rows):
        (alone,) = sample(logits[i : i + 1], [mixed_sequence(row | {"top_n": 1 + i})], EOS)
        assert alone == together[i]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.lists(SAMPLING, min_size=1, max_size=4), seed=st.integers(0, 10**6), scale=st.sampled_from([0.01, 1.0, 5.0])
)
def test_filters_of_a_wide_vocabulary(rows: list[dict[str, Any]], seed: int, scale: float) -> None:
    """Flat distributions need more than the first try, also beside rows that do not."""
    names = ("top_p", "min_p", "typical_p")
    params = [
        SamplingParams(temperature=row["temperature"] or 0.7, top_k=row["top_k"] * 53, **{n: row[n] for n in names})
        for row in rows
    ]
    logits = scale * random_logits(len(rows), seed, 1300)
    got = filtered_probabilities(logits, FilterParams.of(params, logits.device)).double()
    for own, one, values in zip(got, params, logits.tolist(), strict=True):
        expected = torch.tensor(probabilities(values, one), dtype=torch.float64)
        if not torch.allclose(own / own.sum(), expected, rtol=1e-3, atol=1e-7):
            assert borderline(values, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [24, 1024, 1500, 4096])
def test_row_maxima_are_argmax_with_the_lowest_index_of_ties(dtype: torch.dtype, vocabulary: int) -> None:
    logits = random_logits(40, 3, vocabulary).round().to(dtype)  # many ties
    best, index = row_maxima(logits)
    rows = logits.float().tolist()
    assert index.tolist() == [row.index(max(row)) for row in rows]
    assert best.tolist() == [max(row) for row in rows]
    logits[7, -1], logits[9, 3] = math.nan, math.inf
    assert (~row_maxima(logits)[0].isfinite()).nonzero()[:, 0].tolist() == [7, 9]


def test_uniforms_are_splitmix_and_uniform() -> None:
    seeds = [0, 1, 2**31, 2**63 - 1, 2**64 - 1]
    pairs = [(seed, index) for seed in seeds for index in (0, 1, 77)]
    assert uniforms(*zip(*pairs, strict=True)).tolist() == [uniform(*pair) for pair in pairs]  # type: ignore[arg-type]
    cells = Counter((uniforms(range(2000), [5] * 2000) * 20).astype(int).tolist())
    assert sum((cells[i] - 100) ** 2 / 100 for i in range(20)) < 19 + 7 * math.sqrt(38)


def test_everything_masked_is_an_error_of_its_own() -> None:
    logits = random_logits(3)
    logits[1, [3, 4]] = -math.inf
    sequences = [make_sequence(), make_sequence(guide=FixedGuide({3, 4}), temperature=1.0), make_sequence(seed=1)]
    first, second, third = sample(logits, sequences)
    assert isinstance(second.error, BadSamplingParameter)
    assert first.error is None
    assert third.error is None


def test_a_guide_that_gives_up_fails_alone() -> None:
    sequences = [make_sequence(guide=FixedGuide({3}, fails=True)), make_sequence(guide=FixedGuide({5}))]
    failed, other = sample(random_logits(2), sequences)
    assert isinstance(failed.error, EngineError)
    assert other.token_id == 5


def test_the_smallest_repetition_penalty_does_not_overflow() -> None:
    (choice,) = sample(
        random_logits(1), [make_sequence(repetition_penalty=1e-40, temperature=1.0, prompt_ids=range(VOCAB))]
    )
    assert choice.token_id is not None


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.01}], ids=lambda o: next(iter(o))
)
def test_the_tightest_filter_is_greedy(options: dict[str, float]) -> None:
    logits = random_logits(6, seed=2)
    sampling = {"temperature": 1.0, **options}
    sequences = [make_sequence(seed=i, **sampling) for i in range(6)]
    assert tokens(logits, sequences) == logits.argmax(-1).tolist()


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
            for sequence in sequences:
                sequence.output_ids.append(0)
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
    [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 6},
        {"temperature": 0.8, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.2, "typical_p": 0.7},
    ],
    ids=["plain", "top_k", "top_p and min_p", "typical"],
)
def test_distribution(options: dict[str, float]) -> None:
    """Pearson's chi-square over 3000 draws stays below what chance exceeds once in 10^6; fixed seed."""
    logits, count = random_logits(1, seed=5)[0], 3000
    weights = probabilities(logits.tolist(), SamplingParams(**options))  # type: ignore[arg-type]
    expected = [count * w / math.fsum(weights) for w in weights]
    # Draw i of one seed: all of them in one batch, where a row's token is what it is alone.
    sequences = [make_sequence(seed=11, **options) for _ in range(count)]
    for place, sequence in enumerate(sequences):
        sequence.output_ids += [0] * place
    seen = Counter(tokens(logits.expand(count, -1), sequences))
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
