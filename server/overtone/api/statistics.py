"""Statistics of each adapter: exact counts, and latency quantiles within 8 %, in a bounded table.

A tracked adapter takes about 0.5 KB, 4 KB if its latencies fill every bucket. Once `limit` are tracked, a new one takes the
place of the least recently used one, whose counts go to `other`.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from overtone.api.leaders import Leaders
from overtone.api.usage import ORDERS, Head, Measured, Tally, Usage, head_of, tally_of, used


class Use(NamedTuple):
    """An adapter as it was when a request began to use it; mark: of its tally then."""

    adapter_id: str
    mark: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one adapter, or of all together."""

    requests: int = 0
    generated_tokens: int = 0
    errors: int = 0


class AdapterStatistics:
    """Thread-safe. Its lock is held for microseconds, but for the one copy of all references that `top` takes."""

    def __init__(self, limit: int, leaders: int = 0, clock: Callable[[], float] = time.time) -> None:
        """leaders: of how many the `leaders` are known; clock: Unix seconds."""
        assert leaders < limit
        self._limit, self._clock = limit, clock
        self._lock = threading.Lock()
        self._tallies: OrderedDict[str, bytes] = OrderedDict()  # the least recently used first
        self._leaders, self._short = Leaders(leaders), False
        self._all, self._other = Counts(), Tally()
        self._marks = self._folded = 0

    @property
    def tracked(self) -> int:
        return len(self._tallies)

    @property
    def folded(self) -> int:
        """How often an adapter lost its tally to another."""
        return self._folded

    def begin(self, adapter_id: str) -> Use:
        """A request begins to use an adapter."""
        with self._lock:
            now = self._clock()
            packed = self._tallies.pop(adapter_id, None)
            if packed is None:
                self._make_room()
                self._marks += 1
                packed = Tally(Head(now, now, self._marks)).pack()
            self._tallies[adapter_id] = used(packed, now)
            return Use(adapter_id, head_of(packed).mark)

    def end(self, use: Use, measured: Measured, outcome: str) -> None:
        """The request has ended. If its adapter was deleted or folded meanwhile it counts as one of the others."""
        with self._lock:
            one = tally_of(measured, outcome, self._clock())
            self._all = _plus(self._all, _counts(one.head))
            packed = self._tallies.get(use.adapter_id)
            if packed is None or (tally := Tally.unpack(packed)).head.mark != use.mark:
                self._other.add(one)
                return
            tally.add(one)
            self._tallies[use.adapter_id] = tally.pack()
            self._tallies.move_to_end(use.adapter_id)
            self._leaders.saw(use.adapter_id, tally.head.requests)

    def failed(self, adapter_id: str) -> None:
        """A request ended before it began, because of the adapter."""
        self.end(self.begin(adapter_id), Measured(0.0, 0), "error")

    def forget(self, adapter_id: str) -> None:
        """The adapter was deleted."""
        with self._lock:
            packed = self._tallies.pop(adapter_id, None)
            if packed is not None:
                self._other.add(Tally.unpack(packed))
                self._short |= self._leaders.remove(adapter_id)

    def _make_room(self) -> None:
        while len(self._tallies) >= self._limit:
            oldest, packed = self._tallies.popitem(last=False)
            if oldest in self._leaders:  # it has a series of its own, which must not begin anew
                self._tallies[oldest] = packed
                continue
            self._other.add(Tally.unpack(packed))
            self._folded += 1

    def get(self, adapter_id: str) -> Usage | None:
        """None for an adapter that was not used."""
        with self._lock:
            packed = self._tallies.get(adapter_id)
        return None if packed is None else Tally.unpack(packed).usage(adapter_id)

    def other(self) -> Usage:
        """All that was counted of adapters that have no tally: folded and deleted ones."""
        with self._lock:
            packed = self._other.pack()
        return Tally.unpack(packed).usage("")

    def top(self, order: str, size: int, skip: int = 0, *, descending: bool = True) -> list[Usage]:
        """Up to `size` adapters behind the first `skip` of one of `ORDERS`; among equals by id."""
        found = self._first(ORDERS[order], size + skip, descending)
        return [Tally.unpack(packed).usage(adapter_id) for adapter_id, packed in found[skip:]]

    def _first(self, key: Callable[[Head], float], count: int, descending: bool) -> list[tuple[str, bytes]]:
        with self._lock:
            tallies = list(self._tallies.items())
        sign = -1 if descending else 1
        return heapq.nsmallest(count, tallies, lambda item: (sign * key(head_of(item[1])), item[0]))

    def leaders(self) -> tuple[dict[str, Counts], Counts]:
        """The adapters with the most requests, and the sum over all that there ever were."""
        if self._short:
            self._refill()
        with self._lock:
            found = {each: head_of(self._tallies[each]) for each in self._leaders.ids}
            return {each: _counts(head) for each, head in found.items()}, self._all

    def _refill(self) -> None:
        """A leader was deleted: the next in line is among all others."""
        self._short = False
        for adapter_id, _ in self._first(ORDERS["request_count"], self._leaders.size, descending=True):
            with self._lock:
                packed = self._tallies.get(adapter_id)
                if packed is not None and (requests := head_of(packed).requests):
                    self._leaders.saw(adapter_id, requests)


def _counts(head: Head) -> Counts:
    return Counts(head.requests, head.generated_tokens, head.errors)


def _plus(a: Counts, b: Counts) -> Counts:
    return Counts(a.requests + b.requests, a.generated_tokens + b.generated_tokens, a.errors + b.errors)
