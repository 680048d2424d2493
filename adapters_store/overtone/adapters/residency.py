"""Adapters in memory: loaded once however many ask, evicted least recently used first, never while in use.

Knows digests and sizes; what a load does is its caller's function. Temporary adapters, which exist in memory only,
are evicted before all others.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from overtone.adapters.records import StoreStats
from overtone.adapters.resident import ResidentAdapter
from overtone.errors import AdapterMemoryFull

State = Literal["stored", "loading", "resident"]
_RETRY_AFTER_S = 1.0


@dataclass
class _Shared:
    """What several adapters in memory use. nbytes: counted once."""

    nbytes: int
    users: int = 0


@dataclass
class _Entry:
    """`nbytes` is counted from the moment that a load is admitted; `adapter` and `loading` are never both set."""

    leases: int = 0
    nbytes: int = 0
    adapter: ResidentAdapter | None = None
    loading: Future[ResidentAdapter] | None = None
    temporary: bool = False


class Residency:
    """Thread-safe. `retain` before `load`, `release` after use: an entry without a lease may vanish at any time."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._shared: dict[str, _Shared] = {}
        self._used = self._loads = self._failures = self._hits = self._evictions = 0

    @property
    def budget(self) -> int:
        return self._budget

    def retain(self, digest: str, *, temporary: bool = False) -> None:
        with self._lock:
            entry = self._entries.setdefault(digest, _Entry(temporary=temporary))
            entry.temporary &= temporary
            entry.leases += 1

    def release(self, digest: str) -> None:
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            entry.leases -= 1
            self._entries.move_to_end(digest)
            if entry.leases == 0 and entry.adapter is None and entry.loading is None:
                del self._entries[digest]

    def load(self, digest: str, nbytes: int, loader: Callable[[], ResidentAdapter]) -> ResidentAdapter:
        """The adapter of a retained digest, from memory or through `loader`. nbytes: what it will take, as far as known.

        Raises `AdapterMemoryFull`, and whatever the loader raises, to all who wait for this load; the next call tries
        again.
        """
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            self._entries.move_to_end(digest)
            if entry.adapter is not None:
                self._hits += 1
                return entry.adapter
            ours = entry.loading is None
            if ours:
                self._admit(nbytes)
                entry.nbytes, entry.loading = nbytes, Future()
            loading = entry.loading
        assert loading is not None
        if ours:
            self._run(entry, loading, loader)
        return loading.result()

    def _run(self, entry: _Entry, loading: Future[ResidentAdapter], loader: Callable[[], ResidentAdapter]) -> None:
        try:
            adapter = loader()
        except BaseException as error:
            with self._lock:
                self._failures += 1
                self._used -= entry.nbytes
                entry.nbytes, entry.loading = 0, None
            loading.set_exception(error)
        else:
            with self._lock:
                self._loads += 1
                self._used += adapter.nbytes - entry.nbytes
                entry.nbytes, entry.adapter, entry.loading = adapter.nbytes, adapter, None
                self._share(adapter)
                self._evict(self._used - self._budget)
                too_large = self._used > self._budget
                if too_large:
                    self._give_up(entry, adapter)
            if too_large:
                loading.set_exception(self._too_large(adapter))
            else:
                loading.set_result(adapter)

    def _give_up(self, entry: _Entry, adapter: ResidentAdapter) -> None:
        """Forgets an adapter that, with what it shares, has turned out not to fit."""
        self._failures += 1
        self._used -= entry.nbytes
        entry.nbytes, entry.adapter = 0, None
        self._unshare(adapter)

    def _too_large(self, adapter: ResidentAdapter) -> AdapterMemoryFull:
        size = adapter.nbytes + sum(adapter.shared.values())
        message = (
            f"the adapter needs {size} bytes with what it shares, more than is free of {self._budget} for adapters"
        )
        return AdapterMemoryFull(message, retry_after_s=None if size > self._budget else _RETRY_AFTER_S)

    def _share(self, adapter: ResidentAdapter) -> None:
        for key, nbytes in adapter.shared.items():
            shared = self._shared.setdefault(key, _Shared(0))
            shared.users += 1
            self._used += max(0, nbytes - shared.nbytes)
            shared.nbytes = max(nbytes, shared.nbytes)

    def _remove(self, digest: str) -> None:
        """Forgets an entry, and with its last user what it shares."""
        entry = self._entries.pop(digest)
        self._used -= entry.nbytes
        if entry.adapter is not None:
            self._unshare(entry.adapter)

    def _unshare(self, adapter: ResidentAdapter) -> None:
        for key in adapter.shared:
            shared = self._shared[key]
            shared.users -= 1
            if not shared.users:
                self._used -= self._shared.pop(key).nbytes

    def _admit(self, nbytes: int) -> None:
        """Counts `nbytes` as used, evicting the least recently used as far as needed, or evicts nothing and raises."""
        if nbytes > self._budget:
            message = f"the adapter needs {nbytes} bytes and never fits the {self._budget} bytes for adapters"
            raise AdapterMemoryFull(message)
        missing = self._used + nbytes - self._budget
        if missing > 0 and self._freed_by(self._evictable()) < missing:
            message = f"all of the {self._budget} bytes for adapters are in use or pinned; {nbytes} more are needed"
            raise AdapterMemoryFull(message, retry_after_s=_RETRY_AFTER_S)
        self._evict(missing)
        self._used += nbytes

    def _freed_by(self, digests: Sequence[str]) -> int:
        """Bytes that evicting all of these would free, with what nobody else shares."""
        freed, leaving = 0, Counter[str]()
        for digest in digests:
            entry = self._entries[digest]
            freed += entry.nbytes
            leaving.update(entry.adapter.shared.keys() if entry.adapter is not None else ())
        return freed + sum(self._shared[key].nbytes for key, n in leaving.items() if n == self._shared[key].users)

    def _evictable(self) -> list[str]:
        """What nobody uses: temporary ones first, then the least recently used."""
        free = [
            (not entry.temporary, digest)
            for digest, entry in self._entries.items()
            if entry.adapter is not None and entry.leases == 0 and digest not in self._pinned
        ]
        return [digest for _, digest in sorted(free, key=lambda item: item[0])]

    def _evict(self, missing: int) -> None:
        """Frees at least `missing` bytes as far as there is something to evict."""
        goal = self._used - missing
        for digest in self._evictable() if missing > 0 else ():
            if self._used <= goal:
                break
            self._remove(digest)
            self._evictions += 1

    def set_pinned(self, digests: Set[str]) -> None:
        """From now on exactly these stay in memory once they are there."""
        with self._lock:
            self._pinned = frozenset(digests)

    def drop(self, digest: str) -> bool:
        """Frees a digest that nothing leases; False if something does."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None and entry.leases > 0:
                return False
            if entry is not None:
                self._remove(digest)
            return True

    def state(self, digest: str) -> State:
        with self._lock:
            entry = self._entries.get(digest, _Entry())
            return "resident" if entry.adapter is not None else "loading" if entry.loading is not None else "stored"

    def stats(self, registered_count: int) -> StoreStats:
        with self._lock:
            entries = self._entries.values()
            return StoreStats(
                registered_count=registered_count,
                resident_count=sum(entry.adapter is not None for entry in entries),
                resident_bytes=self._used,
                memory_bytes=self._budget,
                leased_count=sum(entry.leases > 0 for entry in entries),
                load_count=self._loads,
                load_failure_count=self._failures,
                hit_count=self._hits,
                eviction_count=self._evictions,
            )
