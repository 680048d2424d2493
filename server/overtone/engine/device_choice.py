"""The device's own choice of tokens: greedy, as `overtone.engine.sampler` chooses for rows that are plainly greedy."""

from __future__ import annotations

import torch

from overtone.engine.flight import Choice
from overtone.kernels.gpu.layer_configs import greedy_config
from overtone.kernels.gpu.sample import GreedyRoom, choose_greedy


def choose(logits: torch.Tensor, capability: int) -> Choice:
    """The lowest index of each row's largest logit. logits: (S, vocabulary). Does not wait for the device."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    config = greedy_config(capability)
    choose_greedy(logits, tokens, finite, GreedyRoom.of(rows, vocabulary, config, logits.device), config)
    both = torch.stack((tokens, finite.to(torch.int64)))
    if not both.is_cuda:
        return Choice(tokens, lambda: _read(both))
    host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
    host.copy_(both, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def read() -> tuple[list[int], list[bool]]:
        done.synchronize()  # of what was asked for until then, not of the step that follows
        return _read(host)

    return Choice(tokens, read)


def _read(both: torch.Tensor) -> tuple[list[int], list[bool]]:
    tokens, finite = both.tolist()
    return tokens, [bool(one) for one in finite]
