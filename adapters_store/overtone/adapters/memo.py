"""What many adapters share and only the first one computes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])
_BUDGET = 256 << 20
_OF_MEMORY = 8
_MAX_ENTRIES = 1000


def memo_budget(memory_bytes: int, most: int = _BUDGET) -> int:
    """Bytes for a memo beside so many for adapters in memory: an eighth of them, `most` at most."""
    return min(most, memory_bytes // _OF_MEMORY)


class Memo:
    """Tuples by key. Thread-safe. The least recently used are forgotten once there are too many, or what in them has
    `nbytes`, as tensors do, exceeds `max_bytes`; one that exceeds it by itself is not kept."""

    def __init__(self, max_bytes: int = _BUDGET) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, tuple[Any, ...]] = OrderedDict()
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Of the tensors that it keeps."""
        with self._lock:
            return self._used

    def find(self, key: Hashable) -> tuple[Any, ...] | None:
        """What is known for `key`."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for `key`. Two threads may both make it; both get the same in the end if it is
        kept."""
        known = self.find(key)
        if known is not None:
            return known  # type: ignore[return-value]
        made = make()
        if _nbytes(made) > self._max_bytes:
            return made
        with self._lock:
            if key in self._known:
                return self._known[key]  # type: ignore[return-value]
            self._known[key] = made
            self._used += _nbytes(made)
            while self._known and (self._used > self._max_bytes or len(self._known) > _MAX_ENTRIES):
                self._used -= _nbytes(self._known.popitem(last=False)[1])
        return made


def _nbytes(value: tuple[Any, ...]) -> int:
    return sum(getattr(one, "nbytes", 0) for one in value)
