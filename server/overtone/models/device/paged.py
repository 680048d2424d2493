"""Where the tokens of a pass on the device are in the paged cache, and their attention by the Triton kernels.

Stands where `overtone.models.paged.PagedBatch` stands on the CPU. The cache is (pages, layers, page_tokens, 2, kv_heads,
head_dim): a page is one run of memory, so that pages can be lent to adapters (`overtone.models.device.memory`). Kernels
read no key that a token does not see, so recycled pages need no clearing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overtone.kernels.gpu import layer_configs
from overtone.kernels.gpu.attend_decode import SeenKeys, attend_decode, decode_workspace, splits_of
from overtone.kernels.gpu.attend_prefill import Spans, SpanTiles, attend_prefill, prefill_tiles
from overtone.kernels.gpu.scoring import Scoring
from overtone.kernels.gpu.varlen import VarlenAttention
from overtone.models.attend import Softmax
from overtone.models.paged import Span, page_table


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Of prompts, one after another. shapes: (tokens, past) of each; ends: (S + 1,) int32, of their tokens, from 0 on;
    keys: (S,) int32, how many each sees at its end."""

    spans: Spans
    shapes: Sequence[tuple[int, int]]
    ends: torch.Tensor
    keys: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self.shapes)

    @property
    def fresh(self) -> bool:
        """Whether none of them has a past."""
        return not any(past for _, past in self.shapes)


class DevicePaged:
    """A pass's tokens in the cache: decoded ones first, then chunks.

    write_slots: (T,) int64, page * page_tokens + position, -1: a row that only fills the batch; longest: the most keys that
    a decoded token may see, which bounds launches; windows: one a layer; varlen: torch's own attention, for prompts where
    it will do: those without a past, or with pages that it takes.
    """

    def __init__(
        self,
        cache: torch.Tensor,
        write_slots: torch.Tensor,
        windows: Sequence[int | None],
        capability: int,
        decoded: SeenKeys | None = None,
        longest: int = 0,
        chunks: Chunks | None = None,
        varlen: VarlenAttention | None = None,
    ) -> None:
        self.write_slots = write_slots
        self.page_tokens: int = cache.shape[2]
        self._cache, self._windows, self._capability = cache, windows, capability
        self._decoded, self._longest, self._chunks = decoded, longest, chunks
        self._varlen = varlen
        self._tiles: dict[tuple[int, object], SpanTiles] = {}

    def of_layer(self, layer: int) -> torch.Tensor:
        """(pages, page_tokens, 2, kv_heads, D)."""
        return self._cache[:, layer]

    def write(self, layer: int, new: torch.Tensor) -> None:
        """Puts keys and values into the cache. new: (T, 2, kv_heads, D)."""
        # Rows that only fill the batch write to page 0, of which no kernel reads anything.
        slots = self.write_slots.clamp(min=0)
        self.of_layer(layer).index_put_((slots // self.page_tokens, slots % self.page_tokens), new)

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """See `overtone.models.paged.PagedElsewhere`."""
        if query.stride()[1:] != (query.shape[2], 1):  # models' own layers have the heads first
            query = query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        scoring = Scoring(softmax.scale(query.shape[-1]), softmax.cap, softmax.sinks, self._windows[layer] or 0)
        if self._decoded is not None:
            self._attend_decoded(layer, query, out, scoring)
        if self._chunks is not None and self._by_torch(query, new, softmax, scoring):
            self._attend_by_torch(layer, query, new, out, scoring)
        elif self._chunks is not None:
            self._attend_chunks(layer, query, out, scoring)
        return out

    def _by_torch(self, query: torch.Tensor, new: torch.Tensor, softmax: Softmax, scoring: Scoring) -> bool:
        assert self._chunks is not None
        return (
            self._varlen is not None
            and (self._chunks.fresh or self._varlen.takes_pages(self.page_tokens))
            and softmax.plain
            and scoring.window <= 0
            and self._varlen.takes(query.shape[1], new.shape[2], query.shape[2], query.dtype)
        )

    def _attend_by_torch(
        self, layer: int, query: torch.Tensor, new: torch.Tensor, out: torch.Tensor, scoring: Scoring
    ) -> None:
        """The chunks are the last tokens of the pass."""
        assert self._chunks is not None
        assert self._varlen is not None
        chunks = self._chunks
        at = slice(len(query) - chunks.tokens, None)
        longest = max(tokens for tokens, _ in chunks.shapes)
        if chunks.fresh:
            keys, values = new[at, 0], new[at, 1]
            out[at] = self._varlen.attend_fresh(query[at], keys, values, chunks.ends, longest, scoring.scale)
            return
        most = longest, max(tokens + past for tokens, past in chunks.shapes)
        out[at] = self._varlen.attend_cached(
            query[at], self.of_layer(layer), chunks.ends, chunks.keys, chunks.spans.table, most, scoring.scale
        )

    def _attend_decoded(self, layer: int, query: torch.Tensor, out: torch.Tensor, scoring: Scoring) -> None:
        assert self._decoded is not None
        heads, dim = query.shape[1:]
        cache = self.of_layer(layer)
        config = layer_configs.decode_config(self._capability, dim)
        splits = splits_of(self._longest, scoring.window, config)
        room = decode_workspace(len(self._decoded.tokens), heads, dim, splits)
        workspace = torch.empty(room, dtype=torch.float32, device=query.device)
        attend_decode(query, cache, self._decoded, out, workspace, splits, scoring, config)

    def _attend_chunks(self, layer: int, query: torch.Tensor, out: torch.Tensor, scoring: Scoring) -> None:
        assert self._chunks is not None
        cache = self.of_layer(layer)
        group = query.shape[1] // cache.shape[3]
        config = layer_configs.prefill_config(self._capability, query.shape[2], query.element_size())
        tiles = self._tiles.get((group, config))
        if tiles is None:
            tiles = prefill_tiles(self._chunks.shapes, group, config, query.device)
            self._tiles[group, config] = tiles
        attend_prefill(query, cache, self._chunks.spans, tiles, out, scoring, config)


def chunks_of(spans: Sequence[Span], device: torch.device) -> Chunks | None:
    """Of spans of prompts; None if there are none."""
    if not spans:
        return None
    table = page_table([span.pages for span in spans])
    begins = [span.start for span in spans]
    ends = [span.start + span.tokens - spans[0].start for span in spans]
    shapes = [(span.tokens, span.past) for span in spans]
    starts, tokens, past, pages, until, keys = (
        torch.tensor(one, dtype=torch.int32).to(device)
        for one in (
            begins,
            [n for n, _ in shapes],
            [p for _, p in shapes],
            table,
            [0, *ends],
            [n + p for n, p in shapes],
        )
    )
    return Chunks(Spans(starts, tokens, past, pages), shapes, until, keys)
