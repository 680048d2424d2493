"""A look before serving: does this model give the same logits in a packed, paged batch as it does by itself?

A model that ignores our attention, drops our keyword or keeps a state of its own would answer, but wrongly. Two short
sequences, in chunks and side by side, find that out at load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from overtone.errors import UnsupportedModel
from overtone.models.opaque import activations_of
from overtone.models.paged import Paged, Span

PAGE_TOKENS, PAGES = 8, 6
"""Of the cache that a probe needs; page 0 stays zero."""
_LENGTHS = (19, 13)
_TABLES = ((1, 5, 2), (4, 3))
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference, relative to the largest logit: sums in another order, nothing more."""
_COARSE = 0.12
"""Of layers that round their input to 8 bits or fewer: a sum in another order falls to the other side. Tiny random
models with bitsandbytes' 8 bits differ by up to 0.035."""


def _sequences(vocab_size: int, device: torch.device) -> list[torch.Tensor]:
    return [(torch.arange(n, device=device) * 37 + 11 * n) % vocab_size for n in _LENGTHS]


@torch.inference_mode()
def own_logits(model: Any, vocab_size: int) -> list[torch.Tensor]:
    """Logits (n, vocabulary) of each probe sequence alone, by the attention that the model's own file defines.

    Leaves `model` with that attention: install another.
    """
    model.set_attn_implementation("eager")
    device = next(model.parameters()).device
    return [model(input_ids=ids[None], use_cache=False).logits[0] for ids in _sequences(vocab_size, device)]


@torch.inference_mode()
def check_paged(
    model: Any,
    expected: list[torch.Tensor],
    vocab_size: int,
    place: Callable[[Sequence[Span]], Paged],
    *,
    coarse: bool = False,
) -> None:
    """Raises `UnsupportedModel` unless packed steps give `expected`. place: spans, decoded tokens first, in a cache of
    `PAGES` pages of `PAGE_TOKENS`, the same one each time; coarse: some layers round their input."""
    parameter = activations_of(model)
    # Each step: (sequence, first token, end); a step's decode comes first.
    steps = [[(0, 0, 10), (1, 0, 12)], [(1, 12, 13), (0, 10, 18)], [(0, 18, 19)]]
    for step in steps:
        try:
            logits = _run(model, _sequences(vocab_size, parameter.device), step, place)
        except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot run on a paged cache: {error}", field="architectures"
            ) from error
        wanted = torch.stack([expected[sequence][end - 1] for sequence, _, end in step])
        limit = (_COARSE if coarse else _TOLERANCE[parameter.dtype]) * max(1.0, float(wanted.abs().max()))
        if not float((logits - wanted).abs().max()) <= limit:
            raise UnsupportedModel(
                f"{type(model).__name__} answers differently in a packed batch than alone", field="architectures"
            )


def _run(
    model: nn.Module,
    ids: list[torch.Tensor],
    step: list[tuple[int, int, int]],
    place: Callable[[Sequence[Span]], Paged],
) -> torch.Tensor:
    """Logits (len(step), vocabulary) at the end of each part."""
    device = ids[0].device
    spans, start = [], 0
    for sequence, first, end in step:
        spans.append(Span(start, end - first, first, _TABLES[sequence]))
        start += end - first
    lengths = torch.tensor([end - first for _, first, end in step], device=device)
    output = model(
        input_ids=torch.cat([ids[s][first:end] for s, first, end in step])[None],
        position_ids=torch.cat([torch.arange(first, end, device=device) for _, first, end in step])[None],
        use_cache=False,
        logits_to_keep=lengths.cumsum(0) - 1,
        paged=place(spans),
    )
    logits: torch.Tensor = output.logits[0]
    return logits
