"""Pages of the KV cache: who owns which. Torch-free."""

from __future__ import annotations

import heapq


class PageAllocator:
    """Hands out page numbers 1 .. `total`, the lowest first. Page 0 is never owned: it pads, and stays zero."""

    def __init__(self, total: int, page_tokens: int) -> None:
        assert total >= 1
        assert page_tokens >= 1
        self.total = total
        self.page_tokens = page_tokens
        self._free = list(range(1, total + 1))  # a heap
        self._owned: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._owned)

    @property
    def available(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._owned.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages:
            self._owned.remove(page)  # KeyError: freed twice
            heapq.heappush(self._free, page)

    def owned_above(self, last: int) -> list[int]:
        """Pages with higher numbers than `last` that somebody owns."""
        return [page for page in range(last + 1, self.total + 1) if page in self._owned]

    def lend(self, count: int) -> bool:
        """Takes the topmost `count` pages out, so that `total` is less; False, and nothing is changed, if one is owned."""
        last = self.total - count
        if last < 1 or self.owned_above(last):
            return False
        self._free = [page for page in self._free if page <= last]
        heapq.heapify(self._free)
        self.total = last
        return True

    def take_back(self, count: int) -> None:
        """`count` of the pages that were lent are there again."""
        for page in range(self.total + 1, self.total + count + 1):
            heapq.heappush(self._free, page)
        self.total += count
