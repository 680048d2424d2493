"""Pages of the KV cache with their contents remembered: requests that begin alike share whole pages. Torch-free.

A page of P tokens is known by a chain of hashes:

    key_root = SHA256(domain tag, tenant, salt, adapter digest)        each text preceded by its length
    key_i    = SHA256(key_(i-1), the P tokens of page i as little-endian 32-bit integers)

so a key stands for everything that the keys and values in its page depend on, and nobody can make two prompts collide. A
page is published once it is full and computed. Published pages have users; without any they stay, and the least recently
used goes when a page is needed. Whoever uses a page uses its parents too and releases them after it, so a page is never
evicted before its children.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from overtone.engine.pages import PageAllocator
from overtone.engine.sequence import Sequence
from overtone.engine.types import Request

_DOMAIN = b"overtone prefix cache 1"


@dataclass(eq=False, slots=True)
class CachedPage:
    """A published page. listed: it may be found; False once it was withdrawn, while its last users finish."""

    key: bytes
    page: int
    parent: CachedPage | None
    users: int = 1
    listed: bool = True
    children: dict[bytes, CachedPage] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Since the last count. query_tokens: of admitted requests that looked for their prefix; hit_tokens: found;
    evictions: pages that gave way."""

    query_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """Owns the allocator. A page of a sequence is either its own alone or a published one, which nobody writes to.

    prompts_only: pages with generated tokens are not shared: their last bits may differ from those of the same tokens in a
    prompt.
    """

    def __init__(self, allocator: PageAllocator, *, enabled: bool, prompts_only: bool = False) -> None:
        self._allocator = allocator
        self._enabled = enabled
        self._prompts_only = prompts_only
        self._size = allocator.page_tokens
        self._listed: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._idle: dict[int, CachedPage] = {}  # listed and without users, least recently used first
        self._queries = self._hits = self._evictions = 0
        self._reclaim: Callable[[int], None] = lambda _: None

    @property
    def total(self) -> int:
        return self._allocator.total

    @property
    def used(self) -> int:
        """Pages that sequences use."""
        return self._allocator.used - len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that may be found, in use or not."""
        return len(self._listed)

    def pages_for(self, tokens: int) -> int:
        return self._allocator.pages_for(tokens)

    def can_allocate(self, count: int) -> bool:
        missing = count - self._allocator.available - len(self._idle)
        if missing > 0:
            self._reclaim(missing)
        return count <= self._allocator.available + len(self._idle)

    def lends(self, reclaim: Callable[[int], None]) -> None:
        """Pages may be lent from now on. reclaim: asks for so many of them back, as far as that can be."""
        self._reclaim = reclaim

    def allocate(self, count: int) -> list[int]:
        """Pages with unknown contents, evicting what has to go."""
        for _ in range(count - self._allocator.available):
            self._unlist(next(iter(self._idle.values())))
            self._evictions += 1
        return self._allocator.allocate(count)

    def match(self, sequence: Sequence) -> list[CachedPage]:
        """The published pages that go on where `sequence` is. Its last token is never among them: its logits are needed."""
        first = sequence.computed // self._size
        if not self._goes_on(sequence, first) or sequence.request.prompt_logprobs:
            return []
        found: list[CachedPage] = []
        for index in range(first, self._shared_tokens(sequence, sequence.num_tokens - 1) // self._size):
            key = self._key(sequence, index)
            known = None if key is None else self._listed.get(key)
            if known is None:
                break
            found.append(known)
        return found

    def fits(self, sequence: Sequence, found: list[CachedPage]) -> bool:
        """Whether a sequence without pages can have all it needs if it uses `found`."""
        idle = sum(not each.users for each in found)
        return self.can_allocate(self.pages_for(sequence.num_tokens) - len(found) + idle)

    def fits_beside(self, sequence: Sequence, found: list[CachedPage], others: Iterable[Sequence]) -> bool:
        """Whether it could if only `others` had pages."""
        kept = {page for other in others for page in other.pages} | {each.page for each in found}
        return len(kept) + self.pages_for(sequence.num_tokens) - len(found) <= self.total

    def use(self, sequence: Sequence, found: list[CachedPage]) -> None:
        """Puts `found` in the place of its own pages, if it has any yet: their tokens are computed."""
        first = sequence.computed // self._size
        own = sequence.pages[first : first + len(found)]
        for each in found:
            self._idle.pop(each.page, None)
            each.users += 1
        sequence.pages[first : first + len(found)] = [each.page for each in found]
        self._allocator.free(own)
        # What it had computed itself before it was preempted is no hit.
        known, sequence.published = max(sequence.computed, sequence.reached), first + len(found)
        sequence.computed = sequence.published * self._size
        sequence.cached_tokens += max(0, sequence.computed - known)
        self._hits += max(0, sequence.computed - known)

    def count_query(self, sequence: Sequence) -> None:
        """`sequence` is admitted for the first time."""
        if self._shares(sequence) and not sequence.request.prompt_logprobs:
            self._queries += sequence.num_tokens

    def publish(self, sequence: Sequence) -> None:
        """Its full, computed pages may be found from now on. Where another was first, its copy serves both."""
        for index in range(sequence.published, self._shared_tokens(sequence, sequence.computed) // self._size):
            key = self._key(sequence, index)
            if key is None or not self._goes_on(sequence, index):
                return
            parent = self._by_page[sequence.pages[index - 1]] if index else None
            page, known = sequence.pages[index], self._listed.get(key)
            if known is None:
                known = self._listed[key] = self._by_page[page] = CachedPage(key, page, parent)
                if parent is not None:
                    parent.children[key] = known
            else:
                self._idle.pop(known.page, None)
                known.users += 1
                sequence.pages[index] = known.page
                self._allocator.free([page])
            sequence.published = index + 1

    def withdraw(self, sequence: Sequence) -> None:
        """None of its pages, nor anything computed from them, is found again."""
        for page in sequence.pages[:1]:
            if (known := self._by_page.get(page)) and known.listed:
                self._forget(known)

    def release(self, sequence: Sequence) -> None:
        """It uses its pages no more and has computed nothing."""
        for page in reversed(sequence.pages):
            known = self._by_page.get(page)
            if known is None:
                self._allocator.free([page])
                continue
            known.users -= 1
            if known.listed and not known.users:
                self._idle[page] = known
            elif not known.users:
                self._drop(known)
        sequence.reached = max(sequence.reached, sequence.computed)
        sequence.pages, sequence.computed, sequence.published = [], 0, 0

    def lend(self, count: int) -> bool:
        """Takes the topmost pages out, forgetting what is cached there; False, and nothing is changed, if a sequence uses
        one of them."""
        last = self._allocator.total - count
        top = [self._by_page.get(page) for page in self._allocator.owned_above(last)]
        if last < 1 or any(known is None or known.users for known in top):
            return False
        for known in top:
            if known is not None and known.listed:
                self._forget(known)
        return self._allocator.lend(count)

    def take_back(self, count: int) -> None:
        """See `PageAllocator.take_back`."""
        self._allocator.take_back(count)

    def take_counts(self) -> CacheCounts:
        counts = CacheCounts(self._queries, self._hits, self._evictions)
        self._queries = self._hits = self._evictions = 0
        return counts

    def _forget(self, known: CachedPage) -> None:
        """It is not found again, nor what goes on from it."""
        doomed = [known]
        while doomed:
            each = doomed.pop()
            doomed += each.children.values()
            self._unlist(each)

    def _unlist(self, known: CachedPage) -> None:
        del self._listed[known.key]
        known.listed = False
        if known.parent is not None:
            known.parent.children.pop(known.key, None)
        if not known.users:
            del self._idle[known.page]
            self._drop(known)

    def _drop(self, known: CachedPage) -> None:
        del self._by_page[known.page]
        self._allocator.free([known.page])

    def _shared_tokens(self, sequence: Sequence, tokens: int) -> int:
        """How many of its first `tokens` tokens may lie in shared pages."""
        return min(tokens, len(sequence.request.prompt_ids)) if self._prompts_only else tokens

    def _goes_on(self, sequence: Sequence, index: int) -> bool:
        """Whether all its pages before `index` may be found. Not so after a withdrawal: what follows stays its own."""
        before = self._by_page.get(sequence.pages[index - 1]) if index else None
        return index == 0 or (before is not None and before.listed)

    def _shares(self, sequence: Sequence) -> bool:
        if not sequence.page_keys and self._enabled and (root := _root_key(sequence.request)) is not None:
            sequence.page_keys.append(root)
        return bool(sequence.page_keys)

    def _key(self, sequence: Sequence, index: int) -> bytes | None:
        """The key of its page `index`, which must be full of known tokens; None if it must not share."""
        if not self._shares(sequence):
            return None
        keys = sequence.page_keys
        for place in range(len(keys) - 1, index + 1):
            tokens = sequence.token_slice(place * self._size, (place + 1) * self._size)
            keys.append(hashlib.sha256(keys[-1] + struct.pack(f"<{self._size}I", *tokens)).digest())
        return keys[index + 1]


def _root_key(request: Request) -> bytes | None:
    """None if what would be cached has no name: an adapter without a digest."""
    if request.adapter is not None and not request.adapter_key:
        return None
    parts = [_DOMAIN, *(text.encode() for text in (request.tenant, request.cache_salt, request.adapter_key))]
    return hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()
