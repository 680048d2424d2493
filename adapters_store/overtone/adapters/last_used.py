"""When adapters were last used: kept in memory for a while, so that a request costs no write."""

from __future__ import annotations

import threading
import time

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
            if len(self._times) > _MOST:
                del self._times[next(iter(self._times))]

    def take(self) -> dict[str, int]:
        """Id -> microseconds since 1970, of all that were used since the last call."""
        with self._lock:
            times, self._times = self._times, {}
            return times
