"""How good a model is at a task: what it says is compared with what is right.

A task of choices: the likeliest of the choices. Any other: greedy decoding until the end of the text or of the line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.quality.tasks import Sample, Task
from bench.quality.tokens import Tokens, choice_tokens, encode, logits_of, packed
from torch.nn import functional
from transformers import DynamicCache

_TOGETHER = 64
_SPARE_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Score:
    """exact: share of samples answered exactly right; score: the same, but where an answer can be partly right 1 - (edits to
    the right words) / (right words), and 0 where that is negative; loss: mean over learned tokens."""

    score: float
    exact: float
    loss: float


def score(model: Any, tokenizer: Any, task: Task, samples: Sequence[Sample]) -> Score:
    said = answers(model, tokenizer, task, samples)
    exact = sum(answer in sample.answers for answer, sample in zip(said, samples, strict=True)) / len(samples)
    partly = max(0.0, 1 - error_rate(said, samples)) if task.phonemes else exact
    return Score(partly, exact, loss(model, encode(task, samples, tokenizer)))


@torch.inference_mode()
def loss(model: Any, samples: Sequence[Tokens]) -> float:
    """Mean over all tokens of all completions."""
    total, count = 0.0, 0
    for start in range(0, len(samples), _TOGETHER):
        row = packed(samples[start : start + _TOGETHER])
        total += float(functional.cross_entropy(logits_of(model, row), row.targets, reduction="sum"))
        count += len(row.targets)
    return total / count


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, task: Task, samples: Sequence[Sample]) -> list[str]:
    """What the model says to each."""
    tokens = encode(task, samples, tokenizer)
    if task.choices:
        choices = torch.tensor(choice_tokens(task, tokenizer))
        found: list[str] = []
        for start in range(0, len(tokens), _TOGETHER):
            logits = logits_of(model, packed(tokens[start : start + _TOGETHER]))
            found += [task.choices[best] for best in logits[:, choices].argmax(1).tolist()]
        return found
    longest = max(len(one.completion) for one in tokens) + _SPARE_TOKENS
    ends = torch.tensor([tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]])
    by_length: defaultdict[int, list[int]] = defaultdict(list)  # rows of one length need no padding
    for number, one in enumerate(tokens):
        by_length[len(one.prompt)].append(number)
    said: dict[int, str] = {}
    for numbers in by_length.values():
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            prompts = torch.tensor([tokens[number].prompt for number in some])
            ids = _greedy(model, prompts, ends, longest)
            said |= {n: tokenizer.decode(one).strip() for n, one in zip(some, ids, strict=True)}
    return [said[number] for number in range(len(samples))]


def _greedy(model: Any, prompts: torch.Tensor, ends: torch.Tensor, longest: int) -> list[list[int]]:
    """prompts: (rows, T) int64. What each row says before any of `ends`; a row that has ended is computed no further."""
    said: list[list[int]] = [[] for _ in prompts]
    alive, ids, cache = list(range(len(prompts))), prompts, DynamicCache()
    for _ in range(longest):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        best = logits.argmax(1)
        going = (~torch.isin(best, ends)).nonzero()[:, 0]
        alive = [alive[place] for place in going.tolist()]
        if not alive:
            break
        ids = best[going, None]
        for row, token in zip(alive, ids[:, 0].tolist(), strict=True):
            said[row].append(token)
        if len(going) < len(best):
            cache.batch_select_indices(going)
    return said


def error_rate(said: Sequence[str], samples: Sequence[Sample]) -> float:
    """Words inserted, left out or replaced against the first answer, per word of it, over all samples together."""
    right = [sample.answers[0].split() for sample in samples]
    edits = sum(edit_distance(one.split(), words) for one, words in zip(said, right, strict=True))
    return edits / sum(map(len, right))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
