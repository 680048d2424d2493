"""When adapters were last used: kept in memory for a while, so that a request costs no write."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

_MOST = 100_000
"""Beyond so many, the oldest wait no longer for the next flush and are lost."""


class LastUsed:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[str, int] = {}

    def note(self, adapter_id: str) -> None:
        now = time.time_ns() // 1000
        with self._lock:
            self._times.pop(adapter_id, None)
            self._times[adapter_id] = now
            self._forget()

    def take(self) -> dict[str, int]:
        """Id -> microseconds since 1970, of all that were used since the last call."""
        with self._lock:
            times, self._times = self._times, {}
            return times

    def put_back(self, times: Mapping[str, int]) -> None:
        """What was taken and could not be written down; newer times stay."""
        with self._lock:
            self._times = {**{one: then for one, then in times.items() if one not in self._times}, **self._times}
            self._forget()

    def _forget(self) -> None:
        while len(self._times) > _MOST:
            del self._times[next(iter(self._times))]
