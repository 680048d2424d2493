"""A bounded memory of what was read elsewhere that never says again what a change has made untrue.

    reader:  ticket -> read -> put          writer:  commit -> forget -> acknowledge

`forget` follows the commit: a reader that came between a `forget` before it and the commit would find what was true until
then and put it for good. A reader that had read before the commit and is slow to put holds a ticket from before the
`forget`, so its `put` is refused. And since `forget` precedes the acknowledgement, whoever has seen a change acknowledged
finds nothing older here.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")

_STRIPES = 4096
"""Keys share so many counts of changes: a change refuses at worst a `put` of another key, which costs one more read."""


class CoherentCache(Generic[V]):
    """Thread-safe. Values are no None. entries: the most that are kept, the least recently used go first; seconds: how long
    each is good for, by `clock`."""

    def __init__(self, entries: int, *, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = entries, seconds, clock
        self._lock = threading.Lock()
        self._found: OrderedDict[str, tuple[V, float]] = OrderedDict()
        self._changes = [0] * _STRIPES
        self._hits = 0

    def get(self, key: str) -> V | None:
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            if found[1] <= self._clock():
                del self._found[key]
                return None
            self._found.move_to_end(key)
            self._hits += 1
            return found[0]

    @property
    def entries(self) -> int:
        return len(self._found)

    @property
    def hits(self) -> int:
        """How often `get` had an answer."""
        return self._hits

    def ticket(self, key: str) -> int:
        """To be had before `key` is read elsewhere."""
        with self._lock:
            return self._changes[hash(key) % _STRIPES]

    def put(self, key: str, value: V, ticket: int) -> None:
        """Keeps what was read, unless `key` was forgotten since the ticket."""
        until = self._clock() + self._seconds
        with self._lock:
            if self._changes[hash(key) % _STRIPES] != ticket:
                return
            self._found[key] = value, until
            self._found.move_to_end(key)
            if len(self._found) > self._most:
                self._found.popitem(last=False)

    def forget(self, key: str) -> None:
        """After a change of `key` is committed, before it is acknowledged."""
        with self._lock:
            self._changes[hash(key) % _STRIPES] += 1
            self._found.pop(key, None)

    def clear(self) -> None:
        """`forget` of all keys."""
        with self._lock:
            self._changes = [count + 1 for count in self._changes]
            self._found.clear()
