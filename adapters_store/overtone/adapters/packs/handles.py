"""Open packs for reading, a bounded number of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder


@dataclass
class _Handle:
    handle: int
    users: int = 0


class Handles:
    """Thread-safe. At most `limit` packs stay open beside those that are being read."""

    def __init__(self, folder: StoreFolder, limit: int = 64) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Handle] = OrderedDict()

    @contextmanager
    def reading(self, number: int) -> Iterator[int]:
        """A handle that stays good inside, even if the pack is removed. Raises `FileNotFoundError`."""
        with self._lock:
            entry = self._open.get(number)
            if entry is None:
                entry = self._open[number] = _Handle(disk.open_read(self._folder.pack(number)))
            self._open.move_to_end(number)
            entry.users += 1
            self._shrink(self._limit)
        try:
            yield entry.handle
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and self._open.get(number) is not entry:
                    disk.close(entry.handle)

    def _shrink(self, limit: int) -> None:
        while len(self._open) > limit:
            _, entry = self._open.popitem(last=False)
            if not entry.users:
                disk.close(entry.handle)

    def forget(self, number: int) -> None:
        """Closes a pack that was removed, once nobody reads it, so that its bytes come back."""
        with self._lock:
            entry = self._open.pop(number, None)
            if entry is not None and not entry.users:
                disk.close(entry.handle)

    def close(self) -> None:
        with self._lock:
            self._shrink(0)

    def __len__(self) -> int:
        return len(self._open)
