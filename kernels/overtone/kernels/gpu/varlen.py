"""torch's own attention over sequences of different lengths (FlashAttention), where the installed torch has a fit one.

What it can is read from its signature, not from torch's version: names came and went. It needs CUDA and 16-bit numbers,
knows neither caps nor sinks, and pages only of a multiple of 256 tokens; `overtone.kernels.gpu.attend_prefill` does the
rest.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

_NEEDED = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size"}
_PAGED = {"block_table", "seqused_k"}
_PAGE_MULTIPLE = 256
_LARGEST_DIM = 256
_CAUSAL = (-1, 0)


def find_varlen() -> VarlenAttention | None:
    """This torch's, None if it has none that will do."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return VarlenAttention.of(function)


class VarlenAttention:
    """Causal attention of whole sequences, tokens packed."""

    def __init__(self, function: Callable[..., Any], names: frozenset[str]) -> None:
        self._function = function
        self._grouped = "enable_gqa" in names
        self._paged = names >= _PAGED
        # By itself it may split the keys by the longest sequence of the batch, and a row's bits would depend on it.
        self._always: dict[str, Any] = {"window_size": _CAUSAL} | ({"num_splits": 1} if "num_splits" in names else {})

    @staticmethod
    def of(function: Callable[..., Any]) -> VarlenAttention | None:
        """None if `function` does not take what is needed."""
        try:
            names = frozenset(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            return None
        return VarlenAttention(function, names) if names >= _NEEDED else None

    def takes(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> bool:
        """Whether it can attend in a layer of such heads."""
        grouped = heads == kv_heads or (self._grouped and heads % kv_heads == 0)
        return grouped and dim % 8 == 0 and dim <= _LARGEST_DIM and dtype in (torch.float16, torch.bfloat16)

    def takes_pages(self, page_tokens: int) -> bool:
        """Whether `attend_cached` works with such pages."""
        return self._paged and page_tokens % _PAGE_MULTIPLE == 0

    def attend_fresh(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        scale: float,
    ) -> torch.Tensor:
        """query: (T, heads, D); key, value: (T, kv_heads, D), of the same tokens; ends: (S + 1,) int32, sequence s is tokens
        [ends[s], ends[s + 1]), and has no past; returns (T, heads, D)."""
        return self._attended(query, key, value, ends, ends, longest, longest, scale, {})

    def attend_cached(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        ends: torch.Tensor,
        keys: torch.Tensor,
        table: torch.Tensor,
        longest: tuple[int, int],
        scale: float,
    ) -> torch.Tensor:
        """The last tokens of sequences whose keys are in the cache, their own included.

        query: (T, heads, D); cache: (pages, page_tokens, 2, kv_heads, D); ends: (S + 1,) int32, of the tokens; keys:
        (S,) int32, how many a sequence has with them; table: (S, P) int32; longest: the most tokens and the most keys of
        one sequence.
        """
        assert self.takes_pages(cache.shape[1])
        found = {"block_table": table, "seqused_k": keys}
        return self._attended(query, cache[:, :, 0], cache[:, :, 1], ends, None, *longest, scale, found)

    def _attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        key_ends: torch.Tensor | None,
        most: int,
        most_keys: int,
        scale: float,
        more: dict[str, Any],
    ) -> torch.Tensor:
        grouped = {"enable_gqa": True} if self._grouped and query.shape[1] != key.shape[-2] else {}
        options = {**self._always, **grouped, **more, "scale": scale}
        result: torch.Tensor = self._function(query, key, value, ends, key_ends, most, most_keys, **options)
        return result
