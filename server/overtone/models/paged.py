"""Where the tokens of a step are in the paged cache, and which of them attend together.

All tokens of a step are packed into one sequence of T. A token's keys and values go to a slot of the cache: slot = page *
page_tokens + position in the page. Sequences of like length attend as one padded batch, whole pages at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from overtone.kernels.native import NativeKernels, SeenRows
from overtone.models.attend import Softmax


@dataclass(frozen=True, slots=True)
class Span:
    """Packed tokens [start, start + tokens) are consecutive tokens of one sequence: those from its `past`-th on. pages: the
    sequence's, at least up to its last token here."""

    start: int
    tokens: int
    past: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        """How many tokens of the sequence the cache then holds."""
        return self.past + self.tokens

    def slots(self, page_tokens: int) -> Iterable[int]:
        """Where its tokens are written."""
        for position in range(self.past, self.end):
            yield self.pages[position // page_tokens] * page_tokens + position % page_tokens


@dataclass(frozen=True, slots=True)
class Group:
    """B spans that attend together, in layers of one window.

    rows: (B, n) int64, their packed tokens, the last one repeated where a span is shorter; real: (B, n) bool, False on
    repetitions, None if there are none; pages: (B, P) int64, those that their tokens see, padded with page 0; mask: (B, 1,
    n, P * page_tokens) in the cache's dtype, 0 where a key is seen and -inf where not; None: one span without a past or a
    window, each token sees those before it. keys: how many of the P * page_tokens keys there are at most. canonical: the
    shapes depend on each span alone (`overtone.models.canonical`), and its result has to.
    """

    rows: torch.Tensor
    real: torch.Tensor | None
    pages: torch.Tensor
    mask: torch.Tensor | None
    keys: int
    canonical: bool = False


class PagedElsewhere(Protocol):
    """A step's tokens in a paged cache that has an attention of its own. write_slots: (T,) int64, where each is written."""

    write_slots: torch.Tensor

    def of_layer(self, layer: int) -> torch.Tensor:
        """The layer's part of the cache, as the kernels of its device take it."""

    def write(self, layer: int, new: torch.Tensor) -> None:
        """Puts the step's keys and values into the cache. new: (T, 2, kv_heads, D)."""

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """query: (T, heads, D); new: (T, 2, kv_heads, D), the step's own keys and values, which are in the cache already;
        returns (T, heads, D)."""


class PagedBatch:
    """A step's tokens in the cache.

    cache: (layers, slots, 2, kv_heads, head_dim), keys then values; windows: one a layer, how many tokens (itself included)
    a token sees there, None: all. The cache keeps all tokens of a sequence in every layer, also those outside a layer's
    window: pages hold all layers. Page 0 is nobody's and stays zero: padding and masked slots hold zeros (never stale
    values, which might be NaN), so that weights of 0 stay 0. native: kernels for single tokens, if they can read the cache.
    """

    def __init__(
        self,
        cache: torch.Tensor,
        page_tokens: int,
        spans: Sequence[Span],
        windows: Sequence[int | None],
        native: NativeKernels | None = None,
    ) -> None:
        self.cache = cache
        self.page_tokens = page_tokens
        self.native = native if native is not None and native.can_attend(cache) else None
        self._windows = windows
        self._groups: dict[tuple[int | None, bool], list[Group]] = {}
        self._rows: dict[int | None, SeenRows | None] = {}
        self._spans = spans
        slots = [slot for span in spans for slot in span.slots(page_tokens)]
        self.write_slots = torch.tensor(slots, dtype=torch.int64, device=cache.device)

    def of_layer(self, layer: int) -> torch.Tensor:
        """(slots, 2, kv_heads, D)."""
        return self.cache[layer]

    def write(self, layer: int, new: torch.Tensor) -> None:
        """Puts the step's keys and values into the cache. new: (T, 2, kv_heads, D)."""
        self.cache[layer].index_copy_(0, self.write_slots, new)

    def groups(self, layer: int, *, singles: bool = True) -> list[Group]:
        """All spans, without those of one token unless `singles`, with what `layer` sees of them; made once a step for
        layers of one window."""
        key = self._windows[layer], singles
        if key not in self._groups:
            spans = [span for span in self._spans if singles or span.tokens > 1]
            self._groups[key] = [self._group(bucket, key[0]) for bucket in _buckets(spans, self.page_tokens)]
        return self._groups[key]

    def single_rows(self, layer: int) -> SeenRows | None:
        """The tokens that attend one by one, for the native kernels, None if there are none; once a step for layers of one
        window."""
        window = self._windows[layer]
        if window not in self._rows:
            singles = self._singles()
            self._rows[window] = self._seen(singles, window) if singles else None
        return self._rows[window]

    def _singles(self) -> list[tuple[Span, int]]:
        """The tokens that attend one by one, by their position."""
        return [(span, span.past) for span in self._spans if span.tokens == 1]

    def _seen(self, singles: Sequence[tuple[Span, int]], window: int | None) -> SeenRows:
        assert self.native is not None
        size = self.native.part_keys
        first = [0 if window is None else max(0, position + 1 - window) for _, position in singles]
        last = [position + 1 for _, position in singles]
        table = page_table([span.pages[: position // self.page_tokens + 1] for span, position in singles])
        packed = [span.start + position - span.past for span, position in singles]
        tokens, seen_from, seen_to, pages = (
            torch.tensor(one, dtype=torch.int64) for one in (packed, first, last, table)
        )
        parts = max((stop - 1) // size - start // size + 1 for start, stop in zip(first, last, strict=True))
        return SeenRows(tokens, torch.arange(len(singles)), seen_from, seen_to, pages, parts)

    def _group(self, spans: Sequence[Span], window: int | None) -> Group:
        size, device = self.page_tokens, self.cache.device
        longest = max(span.tokens for span in spans)
        rows = torch.tensor([span.start for span in spans], device=device)[:, None]
        tokens, past = (
            torch.tensor(one, device=device)[:, None]
            for one in ([span.tokens for span in spans], [span.past for span in spans])
        )
        order = torch.arange(longest, device=device)[None]
        position = past + order  # (B, n), of each query in its sequence
        real = order < tokens
        # The first page that a query sees.
        first = [0 if window is None else max(0, span.past - window + 1) // size for span in spans]
        pages = page_table([span.pages[start : -(-span.end // size)] for start, span in zip(first, spans, strict=True)])
        table = torch.tensor(pages, dtype=torch.int64, device=device)
        keys = max(span.end - start * size for start, span in zip(first, spans, strict=True))
        mask = None
        if len(spans) > 1 or spans[0].past or (window is not None and window < longest):
            key = torch.tensor(first, device=device)[:, None] * size + torch.arange(
                table.shape[1] * size, device=device
            )
            mask = self._mask(position, key, window)
        return Group(rows + order.minimum(tokens - 1), None if bool(real.all()) else real, table, mask, keys)

    def _mask(self, position: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
        """position: (B, n), key: (B, L), both places in their sequence; returns (B, 1, n, L)."""
        ahead = key[:, None] > position[:, :, None]
        hidden = ahead if window is None else ahead | (position[:, :, None] - key[:, None] >= window)
        return torch.zeros(hidden.shape, dtype=self.cache.dtype, device=key.device).masked_fill_(hidden, -torch.inf)[
            :, None
        ]


Paged: TypeAlias = PagedBatch | PagedElsewhere


def _buckets(spans: Sequence[Span], size: int) -> list[list[Span]]:
    """Spans by the powers of two that their tokens and their pages fit in: padding at most doubles what is read along
    either, so one long sequence does not make all others as dear as itself."""
    buckets: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        shape = (span.tokens - 1).bit_length(), (-(-span.end // size) - 1).bit_length()
        buckets.setdefault(shape, []).append(span)
    return list(buckets.values())


def page_table(tables: Sequence[Sequence[int]]) -> list[list[int]]:
    """One row each, the shorter ones filled up with page 0."""
    longest = max(map(len, tables))
    return [[*table, *[0] * (longest - len(table))] for table in tables]
