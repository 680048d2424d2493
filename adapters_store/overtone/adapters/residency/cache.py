"""Adapters in memory: loaded once however many ask, evicted by worth, never while in use.

Knows digests and sizes; what a load does is its caller's function. No use of what is in memory takes time that grows with
the number of entries, so that even a thread that must not wait may ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from concurrent.futures import Future
from typing import Literal

from overtone.adapters.records import StoreStats
from overtone.adapters.residency.contents import Contents, Entry, Gone
from overtone.adapters.residency.costs import LoadCosts
from overtone.adapters.residency.counts import Counts
from overtone.adapters.residency.full import all_in_use, never_fits, too_large
from overtone.adapters.resident import ResidentAdapter

State = Literal["stored", "loading", "resident"]

_PATIENCE_S = 0.001
_BIT = 256 << 10
"""Bytes that are made free at a time: thousands of small adapters may go for a large one, and others want the lock."""


class Residency:
    """Thread-safe. `retain` before `load`, `release` after use: an entry without a lease may vanish at any time.

    overhead: bytes that each adapter counts beside its own. clock: seconds.
    """

    def __init__(self, budget: int, *, overhead: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._contents, self._costs = Contents(budget, overhead), LoadCosts()
        self._entries = self._contents.entries
        self._counts = Counts()

    @property
    def budget(self) -> int:
        return self._contents.budget

    def fits(self, nbytes: int) -> bool:
        """Whether an adapter of so many bytes could ever be in memory."""
        return self._contents.fits(nbytes)

    def retain(self, digest: str, *, temporary: bool = False) -> None:
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                entry = self._entries[digest] = Entry(digest, temporary)
            self._contents.lease(entry, temporary)

    def retain_resident(self, digest: str, *, temporary: bool = False) -> ResidentAdapter | None:
        """`retain` and `load` in one, for who must not wait; None, and nothing is retained, if it is not in memory."""
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return None
        try:
            entry = self._entries.get(digest)
            if entry is None or entry.adapter is None:
                return None
            self._contents.lease(entry, temporary)
            self._count(entry, hit=True)
            return entry.adapter
        finally:
            self._lock.release()

    def release(self, digest: str) -> None:
        with self._lock:
            self._contents.release(digest)

    def load(
        self, digest: str, nbytes: int, loader: Callable[[], ResidentAdapter], *, waited: bool = False
    ) -> ResidentAdapter:
        """The adapter of a retained digest, from memory or through `loader`. nbytes: what it will take, as far as known;
        waited: it was not there before the caller had somebody `bring` it.

        Raises `AdapterMemoryFull`, and whatever the loader raises, to all who wait for this load; the next call tries
        again.
        """
        return self._load(digest, nbytes, loader, "waits" if waited else "uses")

    def bring(self, digest: str, nbytes: int, loader: Callable[[], ResidentAdapter]) -> None:
        """`load` for somebody who will `load` it: this is no use of it."""
        self._load(digest, nbytes, loader, "brings")

    def _load(
        self, digest: str, nbytes: int, loader: Callable[[], ResidentAdapter], why: Literal["uses", "waits", "brings"]
    ) -> ResidentAdapter:
        if nbytes > _BIT:
            self._thin_out(lambda: self._contents.short_of(nbytes, {}, 0) if self._absent(digest) else 0)
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            if why != "brings":
                self._count(entry, hit=entry.adapter is not None and why == "uses")
            if entry.adapter is not None:
                return entry.adapter
            loading, ours, gone = entry.loading, entry.loading is None, Gone()
            if loading is None:
                gone = self._admit(entry, nbytes)
                loading = entry.loading = Future()
        del gone
        try:
            if ours:
                self._run(entry, loading, loader)
            return loading.result()
        finally:
            del loading  # else an error would hold itself through its traceback

    def _absent(self, digest: str) -> bool:
        """Neither here nor on its way."""
        entry = self._entries.get(digest)
        return entry is None or (entry.adapter is None and entry.loading is None)

    def _thin_out(self, short_of: Callable[[], int]) -> None:
        """Makes most of the room for something large, as long as others do not take it. short_of: bytes that are to be freed
        yet, asked with the lock held."""
        missing = gone = None
        while missing is None or missing > _BIT:
            del gone
            with self._lock:
                missing = short_of()
                gone = self._contents.make_room(min(missing, _BIT))

    def _run(self, entry: Entry, loading: Future[ResidentAdapter], loader: Callable[[], ResidentAdapter]) -> None:
        started = self._clock()
        try:
            adapter = loader()
            seconds = self._clock() - started
            if adapter.whole_nbytes > _BIT:
                self._thin_out(lambda: self._contents.short_of(adapter.nbytes, adapter.shared, entry.nbytes))
            with self._lock:
                cost = self._costs.measured(adapter.source, seconds)
                gone = self._contents.keep(entry, adapter, cost)
                if gone is None:
                    raise too_large(adapter, self.budget)
                entry.loading = None
                self._counts.loads[adapter.source] += 1
        except BaseException as error:
            with self._lock:
                self._counts.failures += 1
                self._contents.give_up(entry)
                entry.loading = None
            loading.set_exception(error)
            del loading
        else:
            loading.set_result(adapter)

    def insert(self, digest: str, adapter: ResidentAdapter) -> bool:
        """Takes in what is in memory already, as if it had been loaded. Returns whether it is there now: not if there is no
        room beside what is leased or pinned, and not while it is being loaded."""
        if adapter.whole_nbytes > _BIT:
            self._thin_out(
                lambda: self._contents.short_of(adapter.nbytes, adapter.shared, 0) if self._absent(digest) else 0
            )
        with self._lock:
            entry = self._entries.get(digest) or Entry(digest, temporary=False)
            if entry.adapter is not None or entry.loading is not None:
                return entry.loading is None
            self._contents.order.use(entry)
            gone = self._contents.keep(entry, adapter, self._costs.usual("disk"))  # whence it would have to come again
            if gone is None:
                return False
            self._counts.loads["memory"] += 1
            self._entries[digest] = entry
            if not entry.leases:
                self._contents.offer(entry)
        return True

    def leases(self, digest: str) -> int:
        with self._lock:
            entry = self._entries.get(digest)
            return 0 if entry is None else entry.leases

    def set_pinned(self, digests: Set[str]) -> None:
        """From now on exactly these stay in memory once they are there."""
        with self._lock:
            self._contents.pin(digests)

    def drop(self, digest: str) -> bool:
        """Frees a digest that nothing leases; False if something does."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or entry.leases > 0:
                return entry is None
            gone = self._contents.remove(entry)
        del gone
        return True

    def state(self, digest: str) -> State:
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or self._absent(digest):
                return "stored"
            return "loading" if entry.adapter is None else "resident"

    def stats(self, registered_count: int) -> StoreStats:
        with self._lock:
            return self._counts.stats(registered_count, self._contents)

    def _count(self, entry: Entry, *, hit: bool) -> None:
        self._contents.order.use(entry)
        self._counts.hits += hit
        self._counts.misses += not hit

    def _admit(self, entry: Entry, nbytes: int) -> Gone:
        """Room for a load, or `AdapterMemoryFull`."""
        if not self.fits(nbytes):
            raise never_fits(nbytes, self.budget)
        gone = self._contents.admit(entry, nbytes)
        if gone is None:
            raise all_in_use(nbytes, self.budget)
        return gone
