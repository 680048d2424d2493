"""What is in memory, in bytes of a budget. Not thread-safe: for `Residency`, with its lock held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from concurrent.futures import Future

from overtone.adapters.residency.eviction import Candidate, EvictionOrder
from overtone.adapters.residency.sharing import SharedBytes
from overtone.adapters.resident import ResidentAdapter

Gone = list[ResidentAdapter]
"""What was evicted: to be let go of without the lock, because to free thousands of tensors takes a while."""

ENTRY_BYTES = 768
"""What an adapter in memory takes beside its numbers: the entry, its places in the table and in the order of eviction, the
digest and the `ResidentAdapter`. A test measures it."""


class Entry(Candidate):
    """A digest that is in memory, or leased. `nbytes` is counted from the moment that a load is admitted; `adapter` and
    `loading` are never both set."""

    __slots__ = ("adapter", "leases", "loading")

    def __init__(self, digest: str, temporary: bool) -> None:
        super().__init__(digest, temporary)
        self.leases = 0
        self.adapter: ResidentAdapter | None = None
        self.loading: Future[ResidentAdapter] | None = None


class Contents:
    """Entries by digest. overhead: bytes that each adapter counts beside its own. resident, leased: how many there are;
    evictions: since the start."""

    def __init__(self, budget: int, overhead: int) -> None:
        self.budget, self._overhead = budget, overhead
        self.entries: dict[str, Entry] = {}
        self.order = EvictionOrder[Entry]()
        self.resident = self.leased = self.evictions = 0
        self._pinned: frozenset[str] = frozenset()
        self._shared = SharedBytes()
        self._own = 0

    @property
    def used(self) -> int:
        """Bytes."""
        return self._own + self._shared.total

    def fits(self, nbytes: int) -> bool:
        """Whether an adapter of so many bytes could ever be in memory."""
        return nbytes + self._overhead <= self.budget

    def missing(self, nbytes: int) -> int:
        """Bytes that are not free for such an adapter; not above 0 if it has room."""
        return self.used + nbytes + self._overhead - self.budget

    def lease(self, entry: Entry, temporary: bool) -> None:
        entry.leases += 1
        if entry.leases == 1:
            self.leased += 1
            if entry.idle:
                self._withdraw(entry)
        if not temporary:
            entry.temporary = False

    def release(self, digest: str) -> None:
        entry = self.entries[digest]
        assert entry.leases > 0
        entry.leases -= 1
        if entry.leases == 0:
            self.leased -= 1
            if entry.adapter is not None:
                self.offer(entry)
            elif entry.loading is None:
                del self.entries[digest]

    def offer(self, entry: Entry) -> None:
        """An adapter that nobody leases may go, unless it is pinned."""
        if entry.digest not in self._pinned:
            self._offer(entry)

    def pin(self, digests: Set[str]) -> None:
        """Exactly these."""
        before, self._pinned = self._pinned, frozenset(digests)
        for entry in self._among(self._pinned - before):
            if entry.idle:
                self._withdraw(entry)
        for entry in self._among(before - self._pinned):
            if not entry.leases:
                self._offer(entry)

    def _offer(self, entry: Entry) -> None:
        assert entry.adapter is not None
        self.order.offer(entry)
        self._shared.rest(entry.adapter.shared)

    def _withdraw(self, entry: Entry) -> None:
        assert entry.adapter is not None
        self.order.withdraw(entry)
        self._shared.wake(entry.adapter.shared)

    def _among(self, digests: Set[str]) -> Iterator[Entry]:
        return (self.entries[digest] for digest in digests if digest in self.entries)

    def admit(self, entry: Entry, nbytes: int) -> Gone | None:
        """Counts an adapter that is to come, evicting as far as needed; None, and nothing happens, if it has no room."""
        gone = self.make_room(self.missing(nbytes))
        if gone is not None:
            entry.nbytes = nbytes + self._overhead
            self._own += entry.nbytes
        return gone

    def give_up(self, entry: Entry) -> None:
        """Undoes `admit`."""
        self._own -= entry.nbytes
        entry.nbytes = 0

    def keep(self, entry: Entry, adapter: ResidentAdapter, cost: float) -> Gone | None:
        """Puts an adapter into an entry that is not idle, evicting as far as needed; None, and nothing happens, if it does
        not fit with what it shares. cost: seconds to bring it again."""
        admitted, entry.nbytes = entry.nbytes, adapter.nbytes + self._overhead
        self._own += entry.nbytes - admitted
        sizes = self._shared.add(adapter.shared)
        gone = self.make_room(self.used - self.budget)
        if gone is None:
            self._shared.undo(sizes)
            self._own -= entry.nbytes - admitted
            entry.nbytes = admitted
            return None
        entry.adapter = adapter
        self.resident += 1
        self.order.value(entry, cost / max(1, entry.nbytes))
        return gone

    def short_of(self, nbytes: int, shared: Mapping[str, int], counted: int) -> int:
        """Bytes to be freed for such an adapter, of which `counted` are admitted; 0 if it has room, or cannot have any."""
        missing = self.missing(nbytes) - counted + self._shared.growth(shared)
        free = self.order.nbytes + self._shared.idle - self._shared.idle_among(shared)
        return missing if 0 < missing <= free else 0

    def make_room(self, missing: int) -> Gone | None:
        """Evicts what frees `missing` bytes, with what nobody else shares, or nothing if all that is idle would not."""
        if missing > self.order.nbytes + self._shared.idle:
            return None
        gone: Gone = []
        enough = self.used - missing
        while self.used > enough and (entry := self.order.take()) is not None:
            assert entry.adapter is not None
            self._shared.wake(entry.adapter.shared)
            gone.append(entry.adapter)
            self.remove(entry)
        self.evictions += len(gone)
        return gone

    def remove(self, entry: Entry) -> ResidentAdapter | None:
        """Forgets an entry, and with its last user what it shares. Returns what was in it, to be let go of."""
        del self.entries[entry.digest]
        if entry.idle:
            self._withdraw(entry)
        self._own -= entry.nbytes
        adapter, entry.adapter = entry.adapter, None
        if adapter is not None:
            self.resident -= 1
            self._shared.remove(adapter.shared)
        return adapter
