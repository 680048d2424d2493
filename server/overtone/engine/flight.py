"""A step whose tokens the device has chosen, or is going to, and the host does not know yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from overtone.engine.sampler import Sampled, not_finite, plainly_greedy
from overtone.engine.scheduler import StepPlan
from overtone.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Of S rows. tokens: (S,) int64 on the device; read: waits for the device and says the tokens, and of each row whether
    its largest logit is finite."""

    tokens: torch.Tensor
    read: Callable[[], tuple[list[int], list[bool]]]


class AheadRunner(Protocol):
    """A runner whose steps can be begun before the last one's tokens are known. None of these waits for the device."""

    def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of a plan. tokens: of a plan of `Scheduler.look_ahead`, (S,) int64 on the device: its sequences' next
        ones."""

    def choose(self, logits: torch.Tensor) -> Choice | None:
        """The greedy token of each row of the last run's logits (S, vocabulary), the lowest index of its largest; None: what
        follows that run cannot be begun before its tokens are known."""


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A plan of decodes that has been begun."""

    plan: StepPlan
    choice: Choice

    @property
    def sequences(self) -> list[Sequence]:
        """Whose tokens are chosen; some may have ended since."""
        return [chunk.sequence for chunk in self.plan.decodes]

    def sampled(self) -> list[Sampled]:
        """What the device chose; waits for it."""
        tokens, finite = self.choice.read()
        return [
            Sampled(token) if sound else Sampled(None, error=not_finite())
            for token, sound in zip(tokens, finite, strict=True)
        ]

    def tokens_of(self, plan: StepPlan) -> torch.Tensor:
        """Of the sequences of `plan`, all of which are in this one, in its order."""
        places = {chunk.sequence: place for place, chunk in enumerate(self.plan.decodes)}
        rows = [places[chunk.sequence] for chunk in plan.decodes]
        if rows == list(range(len(places))):
            return self.choice.tokens
        at = torch.tensor(rows)
        if self.choice.tokens.is_cuda:  # a copy from memory that is not pinned would wait for the step under way
            at = at.pin_memory().to(self.choice.tokens.device, non_blocking=True)
        return self.choice.tokens[at]


def can_fly(plan: StepPlan) -> bool:
    """Whether the device alone can choose the plan's tokens."""
    return not plan.prefills and all(
        plainly_greedy(chunk.sequence) and not chunk.sequence.request.logprobs and not chunk.sequence.request.top_n
        for chunk in plan.decodes
    )
