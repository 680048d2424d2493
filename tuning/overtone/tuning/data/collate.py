"""Samples into padded batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overtone.tuning.data.types import IGNORED, Batch, Place, Sample


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step learns from: batches whose gradients add up. learned: tokens with a label that counts."""

    batches: tuple[Batch, ...]
    places: tuple[Place, ...]
    learned: int


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Pads on the right to the longest: (rows, longest) int64 each."""
    longest = max(len(sample.input_ids) for sample in samples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded([sample.input_ids for sample in samples], pad),
        "attention_mask": padded([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": padded([sample.labels for sample in samples], IGNORED),
    }


def learned_tokens(batch: Batch) -> int:
    """Labels that count: the first token of a row has nothing before it that could predict it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def steps_of(
    samples: Sequence[Sample], *, batch_size: int, accumulation: int, pad: int, by_length: str | None
) -> list[Step]:
    """Batches of `batch_size`, `accumulation` of them a step; the last ones may be smaller.

    by_length: a seed; batches are then of samples of like length, in a shuffled order.
    """
    rows = list(samples)
    if by_length is not None:
        rows.sort(key=lambda sample: len(sample.input_ids))
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if by_length is not None:
        random.Random(by_length).shuffle(groups)
    return [_step(groups[start : start + accumulation], pad) for start in range(0, len(groups), accumulation)]


def _step(groups: Sequence[Sequence[Sample]], pad: int) -> Step:
    batches = tuple(collate(group, pad) for group in groups)
    places = tuple(sample.place for group in groups for sample in group)
    return Step(batches, places, sum(map(learned_tokens, batches)))
