"""Pages of the KV cache: who owns which. Torch-free."""

from __future__ import annotations


class PageAllocator:
    """Hands out page numbers 1 .. `total`. Page 0 is never owned: it pads, and stays zero."""

    def __init__(self, total: int, page_tokens: int) -> None:
        assert total >= 1
        assert page_tokens >= 1
        self.total = total
        self.page_tokens = page_tokens
        self._free = list(range(total, 0, -1))
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
        pages = [self._free.pop() for _ in range(count)]
        self._owned.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages:
            self._owned.remove(page)  # KeyError: freed twice
            self._free.append(page)
