"""The loss of a batch, summed over the tokens that are learned, and its mean over an evaluation set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from overtone.tuning.data.collate import learned_tokens
from overtone.tuning.data.types import IGNORED, Batch


class SummedLoss:
    """sum over t of -log p(x_t | x_<t) for the tokens with a label, in float32.

    Summed, so that batches of any size add up to the loss of one large batch once they are divided by the tokens of all.
    Logits are computed only where a label in some row needs them, if the model can (`logits_to_keep`): prompts cost none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """batch: (rows, longest) int64 each. Returns a scalar, float32."""
        labels = batch["labels"][:, 1:]
        inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")}
        places = (labels != IGNORED).any(0).nonzero().squeeze(1)
        if self._keeps:
            inputs["logits_to_keep"] = places
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        if not self._keeps:
            logits = logits[:, places]
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, places].flatten(), ignore_index=IGNORED, reduction="sum"
        )


def on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    return {key: tensor.to(device) for key, tensor in batch.items()}


def mean_loss(model: nn.Module, summed: SummedLoss, batches: Sequence[Batch], device: torch.device) -> float:
    """Per learned token, without dropout. The model is left as it was: training or not."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            total = sum(float(summed(model, on_device(batch, device))) for batch in batches)
    finally:
        model.train(training)
    return total / sum(map(learned_tokens, batches))
