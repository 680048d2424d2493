"""Attention of a shape that depends on a token's place in its sequence alone: see `overtone.models.blocks` for why.

Prompt tokens attend in blocks [64 k, 64 k + 64) of their sequence, each in its own place of the block whether or not the
others are in the step; a generated token attends alone, also where it is computed anew in a chunk after a preemption. Keys
are padded to a number of pages that the block's end, or the token's position, decides. Native kernels compute a generated
token as it is: there no row's result depends on others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from overtone.kernels.native import NativeKernels
from overtone.models.attend import Softmax, attend
from overtone.models.blocks import ROWS
from overtone.models.paged import Group, PagedBatch, Span

QUERY_BLOCK = 64


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tokens of `span` in positions [start, stop), a part of the `width` positions from `block` on."""

    span: Span
    start: int
    stop: int
    block: int
    width: int


class CanonicalBatch(PagedBatch):
    """A `PagedBatch` whose groups are of canonical shape, and whose single tokens are the generated ones.

    prompts: how many tokens of each span's sequence are its prompt.
    """

    def __init__(
        self,
        cache: torch.Tensor,
        page_tokens: int,
        spans: Sequence[Span],
        windows: Sequence[int | None],
        prompts: Sequence[int],
        native: NativeKernels | None = None,
    ) -> None:
        super().__init__(cache, page_tokens, spans, windows, native)
        self._pieces = [p for span, prompt in zip(spans, prompts, strict=True) for p in _pieces(span, prompt)]
        # Fewer pages than that, and a sequence's keys would not begin at a multiple of 64 bytes.
        self._unit = ROWS // math.gcd(ROWS, page_tokens)

    def groups(self, layer: int, *, singles: bool = True) -> list[Group]:
        window = self._windows[layer]
        if (window, singles) not in self._groups:
            buckets: dict[tuple[int, int], list[_Piece]] = {}
            for piece in self._pieces:
                if singles or piece.width > 1:
                    buckets.setdefault((piece.width, self._pages(piece, window)), []).append(piece)
            self._groups[window, singles] = [
                self._canonical_group(pieces, width, pages, window) for (width, pages), pieces in buckets.items()
            ]
        return self._groups[window, singles]

    def _singles(self) -> list[tuple[Span, int]]:
        return [(piece.span, piece.start) for piece in self._pieces if piece.width == 1]

    def _first(self, piece: _Piece, window: int | None) -> int:
        """The first page that a query of the block may see."""
        return 0 if window is None else max(0, piece.block - window + 1) // self.page_tokens

    def _pages(self, piece: _Piece, window: int | None) -> int:
        needed = -(-(piece.block + piece.width) // self.page_tokens) - self._first(piece, window)
        return self._unit << (-(-needed // self._unit) - 1).bit_length()

    def _canonical_group(self, pieces: Sequence[_Piece], width: int, pages: int, window: int | None) -> Group:
        device, size = self.cache.device, self.page_tokens
        first = [self._first(piece, window) for piece in pieces]
        table = [
            [*own, *[0] * (pages - len(own))]
            for own in (p.span.pages[start : start + pages] for p, start in zip(pieces, first, strict=True))
        ]
        order = torch.arange(width, device=device)[None]
        packed, start, stop, block = (
            torch.tensor(one, device=device)[:, None]
            for one in zip(*((p.span.start - p.span.past, p.start, p.stop, p.block) for p in pieces), strict=True)
        )
        position = block + order  # (B, width)
        real = (position >= start) & (position < stop)
        rows = packed + position.clamp(start, stop - 1)
        key = torch.tensor(first, device=device)[:, None] * size + torch.arange(pages * size, device=device)
        pages_seen = torch.tensor(table, dtype=torch.int64, device=device)
        mask = self._mask(position, key, window)
        return Group(rows, None if bool(real.all()) else real, pages_seen, mask, pages * size, canonical=True)


def _pieces(span: Span, prompt: int) -> Iterator[_Piece]:
    position = span.past
    while position < min(span.end, prompt):
        block = position - position % QUERY_BLOCK
        stop = min(block + QUERY_BLOCK, span.end, prompt)
        yield _Piece(span, position, stop, block, QUERY_BLOCK)
        position = stop
    for generated in range(position, span.end):
        yield _Piece(span, generated, generated + 1, generated, 1)


def attend_canonical(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """`attend`, the result of each of the B not depending on the others."""
    batch, heads, tokens, dim = query.shape
    if not softmax.plain:
        # The plain products of all at once would be one batched product.
        one = [slice(i, i + 1) for i in range(batch)]
        return torch.cat([attend(query[i].clone(), keys[i], values[i], mask[i], softmax) for i in one])
    if tokens > 1:
        return attend(query, keys, values, mask, softmax)
    grouped = query.reshape(batch, keys.shape[1], -1, dim)
    # Whole blocks of queries: torch's fused attention gives each thread a buffer of that many rows.
    padded = F.pad(grouped, (0, 0, 0, -grouped.shape[2] % ROWS))
    out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask, scale=softmax.scaling)
    return out[:, :, : grouped.shape[2]].reshape(batch, heads, tokens, -1)
