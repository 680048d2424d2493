"""The promise's other side: the plain transformers model with an adapter's dense delta added to its weights.

Nothing here uses Overtone: the deltas come from the adapter's files, in float64 (see `support.dense`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.dense import deltas_in

Adapters = Path | Mapping[Path, float] | None
"""A folder, several with weights, or none."""


class MergedReference:
    """The transformers model itself, one sequence at a time with its own key-value cache, with deltas in its weights."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()
        self._deltas: dict[Path, dict[str, torch.Tensor]] = {}

    def deltas(self, folder: Path) -> dict[str, torch.Tensor]:
        """Module -> delta_W in float64; computed once a folder."""
        if folder not in self._deltas:
            self._deltas[folder] = deltas_in(folder, self.model)
        return self._deltas[folder]

    @contextmanager
    def merged(self, adapters: Adapters) -> Iterator[Any]:
        """The model with the adapters' deltas added to its weights; None: as it is. Only one layer's weight changes, even if
        another layer is tied to it."""
        weights = {adapters: 1.0} if isinstance(adapters, Path) else adapters or {}
        total: dict[str, torch.Tensor] = {}
        for folder, weight in weights.items():
            for name, delta in self.deltas(folder).items():
                total[name] = total.get(name, 0) + weight * delta
        clean = {name: self.model.get_submodule(name).weight for name in total}
        try:
            for name, delta in total.items():
                changed = (clean[name].detach().double() + delta).float()
                self.model.get_submodule(name).weight = torch.nn.Parameter(changed, requires_grad=False)
            yield self.model
        finally:
            for name, weight in clean.items():
                self.model.get_submodule(name).weight = weight

    @torch.inference_mode()
    def logits(self, adapters: Adapters, prompt_ids: Sequence[int]) -> torch.Tensor:
        """(n, vocabulary) float32."""
        with self.merged(adapters) as model:
            logits: torch.Tensor = model(input_ids=torch.tensor([list(prompt_ids)]), use_cache=False).logits[0]
            return logits

    def greedy(self, adapters: Adapters, prompt_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Exactly `new_tokens` greedy tokens, end-of-sequence ignored."""
        with self.merged(adapters) as model, torch.inference_mode():
            inputs, cache, tokens = torch.tensor([list(prompt_ids)]), None, []
            for _ in range(new_tokens):
                out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                inputs = torch.tensor([tokens[-1:]])
        return tokens
