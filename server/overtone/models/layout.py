"""What a model's attention looks like, seen and not guessed: one pass over two tokens in which attention only takes notes.

Configurations name the same thing in many ways. What counts is what a layer hands to its attention, and the mask that
transformers makes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface

from overtone.errors import UnsupportedModel
from overtone.models.attention import use

_NAME = "overtone_notes"
_FAR = 1 << 20
"""A position beyond all windows and chunks that models have."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """kv_heads and head_dim are those of every layer; windows: one a layer, how many tokens a token sees, None: all."""

    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None


@torch.inference_mode()
def layout_of(model: nn.Module, layers: int) -> AttentionLayout:
    """Raises `UnsupportedModel`, naming the setting, unless each of `layers` attends once and all of them alike.

    Leaves `model` with an attention that computes nothing: install another.
    """
    AttentionMaskInterface.register(_NAME, _window_as_mask)
    use(model, _NAME, _take_note)
    notes: list[_Layer] = []
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    kind = type(model).__name__
    try:
        model(input_ids=ids, position_ids=torch.arange(2, device=ids.device)[None], use_cache=False, notes=notes)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise UnsupportedModel(f"{kind} does not run with another attention: {error}", field="architectures") from error
    if sorted(note.index for note in notes) != list(range(layers)):
        raise UnsupportedModel(
            f"{kind} has {layers} layers, which called attention {len(notes)} times: other layers are not supported",
            field="architectures",
        )
    _check_alike(notes)
    windows = tuple(note.window for note in sorted(notes, key=lambda note: note.index))
    return AttentionLayout(notes[0].kv_heads, notes[0].key_dim, windows)


def _check_alike(notes: list[_Layer]) -> None:
    if len({note.kv_heads for note in notes}) > 1:
        raise UnsupportedModel("layers differ in their key-value heads", field="num_key_value_heads")
    if len({dim for note in notes for dim in (note.key_dim, note.value_dim)}) > 1:
        raise UnsupportedModel("keys and values, or layers, differ in their head dimension", field="head_dim")


def _take_note(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    notes: list[_Layer] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention that answers zeros."""
    assert notes is not None, "the model did not pass our keyword on to its attention"
    index: Any = module.layer_idx
    notes.append(_Layer(index, key.shape[1], key.shape[3], value.shape[3], _window(attention_mask, sliding_window)))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _window(mask: torch.Tensor | None, argument: int | None) -> int | None:
    """By the mask: transformers' own attention obeys it, and not the argument."""
    own = mask is not None and (mask.shape != (1, 1, 1, 1) or mask.dtype != torch.int64)
    if own or (mask is None and argument):
        raise UnsupportedModel("the model makes attention masks of its own", field="architectures")
    return None if mask is None else int(mask) or None


def _window_as_mask(
    mask_function: Callable[..., torch.Tensor], local_size: int | None = None, device: Any = None, **kwargs: Any
) -> torch.Tensor:
    """The window in the place of a mask (1, 1, 1, 1), 0 for none. Raises `UnsupportedModel` if the mask is anything else."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for at in (_FAR, _FAR + 1):
        edge = at - (local_size or at)
        keys = torch.tensor([0, edge - 1, edge, edge + 1, at - 1, at, at + 1, at + _FAR], device=device).clamp(min=0)
        seen = torch.stack([mask_function(zero, zero, zero + at, key) for key in keys])
        expected = keys <= at
        if local_size:
            expected &= at - keys < local_size
        if not torch.equal(seen, expected):
            raise UnsupportedModel(
                "the attention mask is neither causal nor a sliding window (chunked or bidirectional attention)",
                field="layer_types",
            )
    return torch.full((1, 1, 1, 1), local_size or 0, device=device)
