"""The sampler by its definitions in generation.proto: one row at a time, in plain Python, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

from overtone.engine.sequence import Sequence as EngineSequence
from overtone.engine.types import SamplingParams

_MASK = 2**64 - 1


def changed(
    logits: Sequence[float], sequence: EngineSequence, ends: frozenset[int], allowed: set[int] | None
) -> list[float]:
    """Logits after penalties, bias and masks. allowed: what the guide lets through."""
    params, output = sequence.request.sampling, sequence.output_ids
    result = list(logits)
    for token in {*sequence.request.prompt_ids, *output}:
        value, penalty = result[token], params.repetition_penalty
        result[token] = value / penalty if value > 0 else value * penalty
    for token in set(output):
        result[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias:
        result[token] += bias
    banned = {*ends, *sequence.request.stopping.stop_token_ids}
    if len(output) >= sequence.request.stopping.min_new_tokens:
        banned = set()
    if allowed is not None:
        banned = set() if allowed <= banned else banned
        banned |= set(range(len(result))) - allowed
    return [-math.inf if token in banned else value for token, value in enumerate(result)]


def probabilities(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """softmax(logits / temperature) of what the filters keep, normalised; ties with the last kept are kept."""
    largest = max(logits)
    scaled = [(value - largest) / params.temperature for value in logits]
    if params.top_k:
        kth = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        scaled = [value if value >= kth else -math.inf for value in scaled]
    weights = _normalised([math.exp(value) for value in scaled])
    if params.top_p < 1.0:
        weights = _until(weights, [-w for w in weights], params.top_p)
    weights = _normalised([w if w >= params.min_p * max(weights) else 0.0 for w in weights])
    if params.typical_p < 1.0:
        entropy = -sum(w * math.log(w) for w in weights if w > 0)
        distance = [abs(-math.log(w) - entropy) if w > 0 else math.inf for w in weights]
        weights = _normalised(_until(weights, distance, params.typical_p))
    return weights


def _until(weights: list[float], keys: list[float], mass: float) -> list[float]:
    """Zero outside the tokens of the smallest keys that together reach `mass`."""
    total = 0.0
    for token in sorted(range(len(weights)), key=keys.__getitem__):
        total += weights[token]
        if total >= mass:
            return [w if key <= keys[token] else 0.0 for w, key in zip(weights, keys, strict=True)]
    return weights


def _normalised(weights: list[float]) -> list[float]:
    total = math.fsum(weights)
    return [w / total for w in weights]


def uniform(seed: int, index: int) -> float:
    """SplitMix64 in Python's integers."""
    start = _mix(seed + 0x9E3779B97F4A7C15 & _MASK)
    return (_mix(start + (index + 1) * 0x9E3779B97F4A7C15 & _MASK) >> 11) / 2**53


def _mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31


def intervals(weights: Sequence[float]) -> list[tuple[float, float]]:
    """Where the uniform number must lie for each token."""
    ends = [math.fsum(weights[: i + 1]) for i in range(len(weights))]
    return list(zip([0.0, *ends[:-1]], ends, strict=True))
