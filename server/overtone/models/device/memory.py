"""The device memory that the KV cache and the adapters share: one budget, one piece, a boundary that moves.

    | page 0 | page 1 | ... pages of the KV cache ... | boundary ->  adapters' extents ... |

Pages are handed out from the bottom, extents from the top. When adapters need more, the topmost pages are lent to them
as long as no running sequence uses them; when extents go, the pages come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from overtone.kernels.gpu.arena import FreeList
from overtone.kernels.gpu.batch import Words

Lend = Callable[[int], bool]
"""Takes that many of the topmost pages out of the KV cache; False, and nothing is changed: a sequence uses one of them."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of one page: keys and values of `tokens` tokens in all layers."""

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return self.layers * self.tokens * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class DeviceMemory:
    """pages: of the cache, page 0 included, before any is lent; adapter_pages: what of the memory is the adapters' own, in
    pages; least_pages: how many are never lent."""

    def __init__(
        self, shape: CacheShape, pages: int, adapter_pages: int, least_pages: int, device: torch.device
    ) -> None:
        assert shape.page_bytes % 16 == 0
        assert 0 < least_pages <= pages
        self._page_words = shape.page_bytes // 4
        self._pages = self.boundary = pages
        self._least = least_pages
        self._lent_back: Callable[[int], None] = lambda _: None
        self._lend: Lend = lambda _: False
        storage = torch.zeros((pages + adapter_pages) * self._page_words, dtype=torch.int32, device=device)
        numbers = storage[: pages * self._page_words].view(shape.dtype)
        self.cache = numbers.view(pages, shape.layers, shape.tokens, 2, shape.kv_heads, shape.head_dim)
        self.words = Words.of(storage, shape.dtype)
        self.extents = FreeList(pages * self._page_words, len(storage))

    def bind(self, lend: Lend, take_back: Callable[[int], None]) -> None:
        """Who owns the pages: lend takes the topmost out, take_back puts as many back."""
        self._lend, self._lent_back = lend, take_back

    @property
    def own_begin(self) -> int:
        """The first word that is the adapters' own: extents before it lie on lent pages."""
        return self._pages * self._page_words

    @property
    def reachable(self) -> int:
        """Words that are free, or would be if all pages were lent that may be."""
        return self.extents.free + (self.boundary - self._least) * self._page_words

    @property
    def lent(self) -> int:
        """Pages that the adapters have of the cache."""
        return self._pages - self.boundary

    def allocate(self, words: int) -> int | None:
        """Where an extent of `words` may lie, if need be on pages that are lent; None if there is no room."""
        found = self.extents.allocate(words)
        if found is not None:
            return found
        missing = -(-(words - self.extents.leading) // self._page_words)
        if self.boundary - missing < self._least or not self._lend(missing):
            return None
        self.boundary -= missing
        self.extents.grow(self.boundary * self._page_words)
        return self.extents.allocate(words)

    def move_up(self, begin: int, words: int) -> int:
        """Where an extent may lie instead, not before where it is: there itself if there is nothing better. Its words are
        the caller's to move."""
        self.extents.release(begin)
        to = self.extents.allocate_last(words)
        assert to is not None, "it fits where it was"
        return to

    def release(self, begin: int) -> None:
        """Gives an extent's room back, and pages that nothing lies on to the cache. The caller makes sure that no kernel in
        flight reads it once somebody else writes there: writes are ordered after it (`DevicePool`)."""
        self.extents.release(begin)
        back = min(self.extents.leading // self._page_words, self.lent)
        if back:
            self.boundary += back
            self.extents.shrink(self.boundary * self._page_words)
            self._lent_back(back)
