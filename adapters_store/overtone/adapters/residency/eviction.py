"""Which adapter leaves memory first: GreedyDual-Size-Frequency.

    priority = clock + frequency * cost / size

(L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs, 1998.) The
clock is the highest priority that was ever evicted, so what is used no more is passed, in time, by what is used now. The
frequency counts uses, each worth half of a new one once so many more of anything have come: it forgets as well.
Temporary adapters go before all others, the least recently used first.

A use costs no step in the heap: an item's place there is one that it once had, never too late, and is put right when it
comes to the top. So each item is in the heap once at most, and one eviction takes O(log n) of what uses have left to do; it
looks at no more than `_LOOKS` items, and where more have a place of old, takes the first of those.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

HALF_LIFE = 8
"""Uses for each idle adapter: enough to tell apart how often they are used."""
LEAST_HALF_LIFE = 1024
_LOOKS = 32
_SLACK = 64
"""Of items in the heap that are not idle, beside as many as are."""


class Candidate:
    """What the order of eviction knows of an adapter. nbytes: what its eviction frees for certain; worth: seconds to bring
    it again for each of these bytes; used: the number of its last use among all uses."""

    __slots__ = (
        "digest",
        "frequency",
        "idle",
        "nbytes",
        "place",
        "place_used",
        "priority",
        "queued",
        "temporary",
        "used",
        "worth",
    )

    def __init__(self, digest: str, temporary: bool) -> None:
        self.digest = digest
        self.temporary = temporary
        self.nbytes = self.used = self.place_used = 0
        self.worth = self.frequency = self.priority = self.place = 0.0
        self.idle = self.queued = False  # may be evicted; is in the heap

    def __lt__(self, other: Candidate) -> bool:
        """By the place in the heap; of equals, what was used longer ago."""
        if self.place != other.place:
            return self.place < other.place
        return self.place_used < other.place_used

    def settle(self) -> None:
        """Makes its place the one that it has earned. Not while it is in the heap."""
        self.place, self.place_used = self.priority, self.used


C = TypeVar("C", bound=Candidate)


class EvictionOrder(Generic[C]):
    """Of what may be evicted, the idle. nbytes: of all of them together. Not thread-safe."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._uses = self._idle = 0
        self._clock = 0.0
        self._heap: list[C] = []
        self._temporary: OrderedDict[str, C] = OrderedDict()

    def use(self, one: C) -> None:
        """Counts a use; a use never lowers a priority."""
        self._uses += 1
        half_life = HALF_LIFE * self._idle + LEAST_HALF_LIFE
        one.frequency = 1.0 + one.frequency * 2.0 ** ((one.used - self._uses) / half_life)
        one.used = self._uses
        self.value(one, one.worth)

    def value(self, one: C, worth: float) -> None:
        """Sets its worth."""
        one.worth = worth
        one.priority = max(one.priority, self._clock + one.frequency * worth)

    def offer(self, one: C) -> None:
        """From now on it may be evicted."""
        assert not one.idle
        one.idle = True
        self.nbytes += one.nbytes
        if one.temporary:
            self._temporary[one.digest] = one
            return
        self._idle += 1
        if not one.queued:
            if len(self._heap) > 2 * self._idle + _SLACK:
                self._tidy()
            one.settle()
            self._push(one)

    def withdraw(self, one: C) -> None:
        """It may be evicted no more."""
        assert one.idle
        one.idle = False
        self.nbytes -= one.nbytes
        if one.temporary:
            del self._temporary[one.digest]
        else:
            self._idle -= 1

    def take(self) -> C | None:
        """Withdraws what goes first, if there is anything, for good."""
        one = next(iter(self._temporary.values())) if self._temporary else self._first()
        if one is not None:
            self.withdraw(one)
            if not one.temporary:
                self._clock = max(self._clock, one.priority)
        return one

    def _first(self) -> C | None:
        """Out of the heap."""
        looked: list[C] = []
        while self._heap and len(looked) < _LOOKS:
            if looked and not self._heap[0] < looked[0]:
                break
            one = self._pop()
            if one.idle:
                one.settle()
                looked.append(one)
                if one < looked[0]:
                    looked[0], looked[-1] = one, looked[0]
        for one in looked[1:]:
            self._push(one)
        return looked[0] if looked else None

    def _push(self, one: C) -> None:
        one.queued = True
        heappush(self._heap, one)

    def _pop(self) -> C:
        one = heappop(self._heap)
        one.queued = False
        return one

    def _tidy(self) -> None:
        """Drops what cannot be evicted now; it comes back when it can."""
        for one in self._heap:
            one.queued = one.idle
        self._heap = [one for one in self._heap if one.idle]
        heapify(self._heap)
