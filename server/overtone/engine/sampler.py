"""Logits to tokens, each row by its own request's parameters. A row's token does not depend on the other rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.engine.sequence import Sequence
from overtone.engine.types import SamplingParams, TokenLogprob, TopToken

_NUCLEUS_FIRST = 1024


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_id is None if the row's logits were not finite: nothing can be chosen from them."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """The next token of each sequence. logits: (S, vocabulary) float32, one row per sequence."""
    assert logits.shape[0] == len(sequences)
    # One pass finds the greedy choice and, since max carries NaN and +inf, the rows that are not finite.
    best, greedy = logits.max(dim=-1)
    finite, choices = best.isfinite().tolist(), greedy.tolist()
    result: list[Sampled] = []
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            result.append(Sampled(None))
            continue
        params = sequence.request.sampling
        if params.greedy and params.repetition_penalty == 1.0:
            token = choices[row]
        else:
            token = _choose(penalised(logits[row], sequence), params, sequence)
        result.append(Sampled(token, _logprob(logits[row], token, sequence)))
    return result


def penalised(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Logits of tokens seen in prompt or output, divided by the penalty if positive, else multiplied (Keskar et al.,
    "CTRL", 2019, with transformers' treatment of negative logits). logits: (vocabulary,)."""
    penalty = sequence.request.sampling.repetition_penalty
    if penalty == 1.0:
        return logits
    seen = torch.tensor(sorted({*sequence.request.prompt_ids, *sequence.output_ids}), device=logits.device)
    scores = logits[seen]
    return logits.index_put((seen,), torch.where(scores > 0, scores / penalty, scores * penalty))


def _choose(logits: torch.Tensor, params: SamplingParams, sequence: Sequence) -> int:
    if params.greedy:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits, params)
    # Inverse of the distribution function at one uniform number, drawn once per token: a seed gives the same text
    # whatever shares the batch.
    cumulative = probabilities.double().cumsum(0)
    target = _uniform(sequence) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding may point behind the last token that is possible at all.
    last = int(probabilities.nonzero()[-1])
    return min(index, last)


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """softmax(logits / temperature) with what top_k, top_p and min_p exclude set to zero; not renormalised. (vocabulary,)"""
    scaled = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        threshold = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    probabilities = scaled.softmax(0)
    if params.top_p < 1.0:
        probabilities = _nucleus(probabilities, params.top_p)
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero outside the smallest set of likeliest tokens that reaches top_p. (vocabulary,)"""
    # The likeliest few nearly always suffice, and finding them is far cheaper than sorting a vocabulary.
    for count in (min(_NUCLEUS_FIRST, probabilities.numel()), probabilities.numel()):
        ordered, order = probabilities.topk(count)
        cumulative = ordered.cumsum(0)
        if float(cumulative[-1]) >= top_p or count == probabilities.numel():
            kept = order[cumulative - ordered < top_p]
            return torch.zeros_like(probabilities).index_put_((kept,), probabilities[kept])
    raise AssertionError("unreachable")


def _uniform(sequence: Sequence) -> torch.Tensor:
    generator = sequence.rng
    if generator is None:
        generator = sequence.rng = torch.Generator().manual_seed(sequence.request.sampling.seed)
    assert isinstance(generator, torch.Generator)
    return torch.rand((), generator=generator, dtype=torch.float64)


def _logprob(logits: torch.Tensor, token: int, sequence: Sequence) -> TokenLogprob | None:
    request = sequence.request
    if not request.logprobs and request.top_n == 0:
        return None
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(request.top_n) if request.top_n else None
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
    return TokenLogprob(
        logprob=float(logprobs[token]),
        rank=int((logits > logits[token]).sum()) + 1,
        top=tuple(TopToken(token_id, logprob) for token_id, logprob in alternatives),
    )
