"""Samples as tokens, and several of them as one row of the model: no padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.quality.tasks import Sample, Task


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample. completion: of its first answer; where the answer is not one of a few choices, with the end of text."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Samples one behind another. ids, positions: (1, T) int64; mask: (1, 1, T, T) bool, who sees whom; learned: (m,)
    int64, the places whose next tokens are `targets`, (m,) int64; samples: (m,) int64, which sample they belong to."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    learned: torch.Tensor
    targets: torch.Tensor
    samples: torch.Tensor


def encode(task: Task, samples: Sequence[Sample], tokenizer: Any) -> list[Tokens]:
    end = () if task.choices else (tokenizer.eos_token_id,)
    return [
        Tokens(_ids(tokenizer, sample.prompt), (*_ids(tokenizer, " " + sample.answers[0]), *end)) for sample in samples
    ]


def choice_tokens(task: Task, tokenizer: Any) -> tuple[int, ...]:
    """Raises `ValueError` for a choice that is not one token."""
    found = [_ids(tokenizer, " " + choice) for choice in task.choices]
    if any(len(ids) != 1 for ids in found):
        raise ValueError(f"{task.name}: every choice must be one token, not {found}")
    return tuple(ids[0] for ids in found)


def packed(samples: Sequence[Tokens]) -> Row:
    """Every sample sees itself alone and has positions from 0; its last token, which predicts nothing, is left out."""
    ids, positions, owner, learned, targets = [], [], [], [], []
    for number, sample in enumerate(samples):
        whole = (*sample.prompt, *sample.completion)
        start = len(ids) + len(sample.prompt) - 1
        learned += range(start, start + len(sample.completion))
        targets += sample.completion
        ids += whole[:-1]
        positions += range(len(whole) - 1)
        owner += [number] * (len(whole) - 1)
    owners, places = torch.tensor(owner), torch.arange(len(ids))
    mask = (owners[:, None] == owners) & (places[:, None] >= places)
    at = torch.tensor(learned)
    return Row(torch.tensor([ids]), torch.tensor([positions]), mask[None, None], at, torch.tensor(targets), owners[at])


def logits_of(model: Any, row: Row) -> torch.Tensor:
    """Of the learned places alone: (m, vocabulary) float32. The head costs as much as a fifth of the layers."""
    hidden = model.get_decoder()(
        input_ids=row.ids, position_ids=row.positions, attention_mask=row.mask, use_cache=False
    ).last_hidden_state
    logits: torch.Tensor = model.get_output_embeddings()(hidden[0, row.learned]).float()
    return logits


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
