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
from overtone.models.attend import Softmax
from overtone.models.paged import Span


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Of prompts. shapes: (tokens, past) of each."""

    spans: Spans
    shapes: Sequence[tuple[int, int]]


class DevicePaged:
    """A pass's tokens in the cache: decoded ones first, then chunks.

    write_slots: (T,) int64, page * page_tokens + position, -1: a row that only fills the batch; longest: the most keys that
    a decoded token may see, which bounds launches; windows: one a layer.
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
    ) -> None:
        self.write_slots = write_slots
        self.page_tokens: int = cache.shape[2]
        self._cache, self._windows, self._capability = cache, windows, capability
        self._decoded, self._longest, self._chunks = decoded, longest, chunks
        self._tiles: dict[tuple[int, object], SpanTiles] = {}

    def of_layer(self, layer: int) -> torch.Tensor:
        """(pages, page_tokens, 2, kv_heads, D)."""
        return self._cache[:, layer]

    def write(self, layer: int, new: torch.Tensor) -> None:
        """Puts keys and values into the cache; not for batches with rows that only fill it. new: (T, 2, kv_heads, D)."""
        pages, places = self.write_slots // self.page_tokens, self.write_slots % self.page_tokens
        self.of_layer(layer).index_put_((pages, places), new)

    def attend(self, layer: int, query: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """query: (T, heads, D); returns (T, heads, D). The pass's own keys and values are in the cache."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        scoring = Scoring(softmax.scale(query.shape[-1]), softmax.cap, softmax.sinks, self._windows[layer] or 0)
        if self._decoded is not None:
            self._attend_decoded(layer, query, out, scoring)
        if self._chunks is not None:
            self._attend_chunks(layer, query, out, scoring)
        return out

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
        config = layer_configs.prefill_config(self._capability, query.shape[2])
        tiles = self._tiles.get((group, config))
        if tiles is None:
            tiles = prefill_tiles(self._chunks.shapes, group, config, query.device)
            self._tiles[group, config] = tiles
        attend_prefill(query, cache, self._chunks.spans, tiles, out, scoring, config)


def chunks_of(spans: Sequence[Span], device: torch.device) -> Chunks | None:
    """Of spans of prompts; None if there are none."""
    if not spans:
        return None
    longest = max(len(span.pages) for span in spans)
    table = [[*span.pages, *[0] * (longest - len(span.pages))] for span in spans]
    starts, tokens, past, pages = (
        torch.tensor(one, dtype=torch.int32).to(device)
        for one in (
            [span.start for span in spans],
            [span.tokens for span in spans],
            [span.past for span in spans],
            table,
        )
    )
    return Chunks(Spans(starts, tokens, past, pages), [(span.tokens, span.past) for span in spans])
