"""What a request does to its logits before a token is chosen: penalties, bias and masks, for all rows at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from overtone.engine.guides import Mask, forbid, unpack, words_for
from overtone.engine.seen_tokens import SeenTokens
from overtone.engine.sequence import Sequence as EngineSequence


def changed_logits(
    logits: torch.Tensor, sequences: Sequence[EngineSequence], eos_token_ids: frozenset[int]
) -> tuple[torch.Tensor, set[int]]:
    """`logits` (R, vocabulary) float32, changed in place: repetition penalty, presence and frequency penalty, logit bias,
    then -inf for what min_new_tokens and the guide exclude. Also the rows whose guide failed."""
    _penalise(logits, sequences)
    _add_bias(logits, sequences)
    # A tiny repetition penalty may overflow.
    logits.clamp_(max=torch.finfo(logits.dtype).max)
    failed = _guide(logits, sequences, eos_token_ids)
    _forbid_ends(logits, sequences, eos_token_ids)
    return logits, failed


def changes_logits(sequence: EngineSequence) -> bool:
    """Whether the request changes the logits of the sequence's next token."""
    request = sequence.request
    params = request.sampling
    return params.penalises or bool(params.logit_bias) or request.guide is not None or _held_open(sequence)


def _penalise(logits: torch.Tensor, sequences: Sequence[EngineSequence]) -> None:
    """Repetition: logits of tokens seen in prompt or output, divided by the penalty if positive, else multiplied (Keskar et
    al., "CTRL", 2019, with transformers' treatment of negative logits). Presence and frequency: minus presence + frequency
    * count for every token that the output has `count` > 0 times (OpenAI's definition)."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.penalises]
    seen = [_seen(sequences[row]) for row in rows]
    params = [sequences[row].request.sampling for row in rows]
    some = [i for i, p in enumerate(params) if p.repetition_penalty != 1.0]
    if some:
        at = _index(logits, [rows[i] for i in some], [seen[i].distinct for i in some])
        factors = _repeat(logits, [params[i].repetition_penalty for i in some], [len(seen[i].distinct) for i in some])
        scores = logits[at]
        logits[at] = torch.where(scores > 0, scores / factors, scores * factors)
    some = [i for i, p in enumerate(params) if p.presence_penalty != 0.0 or p.frequency_penalty != 0.0]
    if some:
        at = _index(logits, [rows[i] for i in some], [seen[i].counts for i in some])
        sizes = [len(seen[i].counts) for i in some]
        counts = [count for i in some for count in seen[i].counts.values()]
        presence = _repeat(logits, [params[i].presence_penalty for i in some], sizes)
        frequency = _repeat(logits, [params[i].frequency_penalty for i in some], sizes)
        logits[at] -= presence + frequency * torch.tensor(counts, dtype=logits.dtype, device=logits.device)


def _seen(sequence: EngineSequence) -> SeenTokens:
    if sequence.seen is None:
        sequence.seen = SeenTokens(sequence.request.prompt_ids)
    sequence.seen.update(sequence.output_ids)
    return sequence.seen


def _add_bias(logits: torch.Tensor, sequences: Sequence[EngineSequence]) -> None:
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logit_bias]
    if rows:
        biases = [sequences[row].request.sampling.logit_bias for row in rows]
        values = [value for bias in biases for _, value in bias]
        at = _index(logits, rows, [[token for token, _ in bias] for bias in biases])
        logits[at] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _guide(logits: torch.Tensor, sequences: Sequence[EngineSequence], eos_token_ids: frozenset[int]) -> set[int]:
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.guide is not None]
    if not rows:
        return set()
    vocabulary = logits.shape[1]
    vocabulary, allowed = logits.shape[1], [_follow(sequences[row]) for row in rows]
    failed = {row for row, follows in zip(rows, allowed, strict=True) if not follows}
    rows = [row for row in rows if row not in failed]
    mask = np.zeros((len(rows), words_for(vocabulary)), dtype=np.int32)
    filled = _fill(mask, [sequences[row] for row in rows])
    for bits, row in zip(mask, rows, strict=True):
        if _held_open(sequences[row]):
            # A guide that has nothing more to say ends the text all the same.
            forbid(bits, _ends(sequences[row], eos_token_ids))
    excluded = torch.from_numpy(~unpack(mask, vocabulary)).to(logits.device)
    at = torch.tensor(rows, device=logits.device)
    logits[at] = logits[at].masked_fill(excluded, -torch.inf)
    return failed | {row for row, done in zip(rows, filled, strict=True) if not done}


def _follow(sequence: EngineSequence) -> bool:
    """Brings its matcher, which outlives a preemption, up to its output. False if its guide does not allow it."""
    assert sequence.request.guide is not None
    if sequence.matcher is None:
        sequence.matcher = sequence.request.guide.matcher()
    return sequence.matcher.follow(sequence.output_ids)


def _fill(mask: Mask, sequences: Sequence[EngineSequence]) -> list[bool]:
    matchers = [sequence.matcher for sequence in sequences if sequence.matcher is not None]
    guide = next((sequence.request.guide for sequence in sequences), None)
    return guide.fill(matchers, mask) if guide is not None else []


def _forbid_ends(logits: torch.Tensor, sequences: Sequence[EngineSequence], eos_token_ids: frozenset[int]) -> None:
    rows = [row for row, s in enumerate(sequences) if s.request.guide is None and _held_open(s)]
    if rows:
        logits[_index(logits, rows, [_ends(sequences[row], eos_token_ids) for row in rows])] = -torch.inf


def _held_open(sequence: EngineSequence) -> bool:
    return len(sequence.output_ids) < sequence.request.stopping.min_new_tokens


def _ends(sequence: EngineSequence, eos_token_ids: frozenset[int]) -> list[int]:
    """The tokens that would end this generation."""
    stopping = sequence.request.stopping
    return sorted({*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_token_ids)})


def _index(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[Iterable[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every token, packed one row after the other."""
    columns = [list(row) for row in tokens]
    flat = [token for row in columns for token in row]
    repeated = np.repeat(np.array(rows, dtype=np.int64), [len(row) for row in columns])
    return torch.from_numpy(repeated).to(logits.device), torch.tensor(flat, dtype=torch.int64, device=logits.device)


def _repeat(logits: torch.Tensor, values: Sequence[float], sizes: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(logits.device)
