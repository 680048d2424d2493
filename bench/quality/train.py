"""A plain training loop: AdamW, the rate rises over a tenth of the steps and falls to zero over the rest.

`learn` is all that the grid knows of it: `overtone.tuning.tune` can take its place.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.quality.tokens import Tokens, logits_of, packed
from torch.nn import functional

from overtone.tuning.methods import Tuned

_WARM_UP = 0.1
_LAST = 0.1
"""Share of the steps whose mean is the loss that is told."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The same for every method: steps of `batch` samples each."""

    steps: int = 96
    batch: int = 8


def learn(model: Any, tuned: Tuned, samples: Sequence[Tokens], pace: Pace, *, lr: float, seed: int) -> float:
    """The mean loss over the last steps, NaN if the run came to grief. seed: of the samples' order."""
    groups = [
        {"params": list(group.parameters), "lr": lr if group.lr is None else group.lr, "weight_decay": 0.0}
        for group in tuned.groups
    ]
    optimiser = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, pace.steps))
    losses = []
    model.train()
    for step, batch in enumerate(_batches(samples, pace, seed)):
        tuned.begin_step(step)
        row = packed(batch)
        loss, penalty = functional.cross_entropy(logits_of(model, row), row.targets), tuned.penalty()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    model.eval()
    last = losses[-max(1, round(_LAST * pace.steps)) :]
    return sum(last) / len(last)


def _share(step: int, steps: int) -> float:
    """Of the learning rate, never 0 in a step that is taken."""
    rise = max(1, round(_WARM_UP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)


def _batches(samples: Sequence[Tokens], pace: Pace, seed: int) -> Iterator[list[Tokens]]:
    """As many as there are steps; whole passes over the samples, each in an order of its own."""
    order: list[Tokens] = []
    draw = random.Random(seed)
    for _ in range(pace.steps):
        while len(order) < pace.batch:
            order += draw.sample(samples, len(samples))
        yield order[: pace.batch]
        del order[: pace.batch]
