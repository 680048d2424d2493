"""The model's own log-probabilities: of chosen tokens and of the prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.types import TokenLogprob, TopToken

MAX_TOP_N = 20

_SLICE = 64
"""Rows turned into float32 log-probabilities at a time."""


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top_n: Sequence[int]) -> list[TokenLogprob]:
    """log_softmax of each row at its token, the token's rank and the row's `top_n` likeliest. logits: (R, vocabulary)."""
    result: list[TokenLogprob] = []
    for start in range(0, len(tokens), _SLICE):
        stop = start + _SLICE
        result += _slice(logits[start:stop].float(), tokens[start:stop], top_n[start:stop])
    return result


def _slice(logits: torch.Tensor, tokens: Sequence[int], top_n: Sequence[int]) -> list[TokenLogprob]:
    logprobs = logits.log_softmax(-1)
    at = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    own = logprobs.gather(1, at)[:, 0].tolist()
    ranks = ((logits > logits.gather(1, at)).sum(-1) + 1).tolist()
    alternatives: list[tuple[TopToken, ...]] = [()] * len(tokens)
    if any(top_n):
        # Always as many: which of two equals comes first must not depend on what the other rows want.
        top = logprobs.topk(min(MAX_TOP_N, logits.shape[1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        alternatives = [
            tuple(map(TopToken, ids[:n], values[:n])) for (ids, values), n in zip(pairs, top_n, strict=True)
        ]
    return [TokenLogprob(*values) for values in zip(own, ranks, alternatives, strict=True)]


def prompt_rows(chunk: Chunk) -> range:
    """Tokens of a chunk, counted from its first, whose logits say how likely the prompt token behind them is, as far as that
    is wanted and not known yet: a sequence that is computed again is asked only for the rest."""
    sequence = chunk.sequence
    if not sequence.request.prompt_logprobs or sequence.output_ids:  # told with the first token
        return range(0)
    start = max(0, len(sequence.prompt_logprobs) - sequence.computed)
    return range(start, max(start, min(chunk.length, len(sequence.request.prompt_ids) - 1 - sequence.computed)))


def take_prompt_logprobs(plan: StepPlan, logits: torch.Tensor) -> None:
    """Appends to the sequences what this step tells of their prompts. To be called before they advance.

    logits: (P, vocabulary), the rows of `prompt_rows` of the plan's prefills, one chunk after the other.
    """
    begin = 0
    for chunk in plan.prefills:
        rows = prompt_rows(chunk)
        if not rows:
            continue
        request, first = chunk.sequence.request, chunk.sequence.computed + rows.start + 1
        tokens = request.prompt_ids[first : first + len(rows)]
        part = logits[begin : begin + len(rows)]
        chunk.sequence.prompt_logprobs += token_logprobs(part, tokens, [request.top_n] * len(rows))
        begin += len(rows)
