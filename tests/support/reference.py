"""The promise's other side: the plain transformers model with an adapter's dense delta merged in float32.

Nothing here uses Overtone: `dense_delta` computes from the adapter's files by the definitions, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.adapters import dense_delta


class MergedReference:
    """Greedy generation by the transformers model itself, one sequence at a time with its own key-value cache."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()

    @contextmanager
    def merged(self, folder: Path | None) -> Iterator[Any]:
        """The model with the adapter in `folder` added to its weights; None: as it is."""
        changed: list[tuple[torch.Tensor, torch.Tensor]] = []
        if folder is not None:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.nn.Linear):
                    delta = dense_delta(folder, name, tuple(module.weight.shape))
                    if delta is not None:
                        changed.append((module.weight, module.weight.detach().clone()))
                        with torch.no_grad():
                            module.weight.add_(torch.as_tensor(delta, dtype=torch.float32))
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for weight, clean in changed:
                    weight.copy_(clean)

    def greedy(self, folder: Path | None, prompt_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Exactly `new_tokens` greedy tokens, end-of-sequence ignored."""
        with self.merged(folder) as model, torch.inference_mode():
            inputs, cache, tokens = torch.tensor([list(prompt_ids)]), None, []
            for _ in range(new_tokens):
                out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                inputs = torch.tensor([tokens[-1:]])
        return tokens
