"""The latest changes of the store, for those who watch: one bounded ring, however many watch and however slowly."""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from dataclasses import dataclass

from overtone.adapters.operations import Event, Kind
from overtone.errors import Draining, InvalidRequest, WatchExpired

CAPACITY = 1 << 16
"""About 10 MB when it is full."""
MAX_CHANGES = 500
"""At most so many are read at once."""
_TOKEN = re.compile(r"([0-9a-f]{16})-([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to an adapter. Not the adapter itself: whoever tells of it reads how it is then."""

    kind: Kind
    adapter_id: str


class Changes:
    """A position is the number of changes before it; a token is a position that other processes' rings refuse."""

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int = CAPACITY) -> None:
        """loop: where `after` is awaited."""
        self._loop, self._capacity = loop, capacity
        self._ring: list[Change | None] = [None] * capacity
        self._lock = threading.Lock()
        self._position = 0
        self._news, self._told = asyncio.Event(), False
        self._closed = False
        self._epoch = secrets.token_hex(8)

    @property
    def position(self) -> int:
        """Behind all changes so far."""
        return self._position

    def publish(self, event: Event) -> None:
        """For any thread; in the order of the events."""
        with self._lock:
            self._ring[self._position % self._capacity] = Change(event.kind, event.adapter_id)
            self._position += 1
            tell, self._told = not self._told, True
        if tell:
            self._wake_soon()

    def close(self) -> None:
        """Ends all watches."""
        self._closed = True
        self._wake_soon()

    def check_open(self) -> None:
        """Raises `Draining` once it is closed."""
        if self._closed:
            raise Draining("the server is shutting down", retry_after_s=1.0)

    def _wake_soon(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody watches
            return

    def _wake(self) -> None:
        with self._lock:
            self._told = False
        self._news.set()
        self._news = asyncio.Event()

    def since(self, position: int) -> list[Change]:
        """The first changes behind a position. Raises `WatchExpired` if they are not all known any more."""
        with self._lock:
            if not self._position - self._capacity <= position <= self._position:
                raise WatchExpired("the changes since then are forgotten: list the adapters and watch from now on")
            end = min(self._position, position + MAX_CHANGES)
            return [change for i in range(position, end) if (change := self._ring[i % self._capacity]) is not None]

    async def after(self, position: int, timeout_s: float) -> list[Change]:
        """`since`, as soon as there are some; none if there are none for so long. Raises `Draining` once it is closed."""
        news = self._news
        found = self.since(position)
        if found:
            return found
        if not self._closed:
            try:
                await asyncio.wait_for(news.wait(), timeout_s)
            except TimeoutError:
                return []
        self.check_open()
        return self.since(position)

    def token(self, position: int) -> str:
        return f"{self._epoch}-{position}"

    def position_of(self, token: str) -> int:
        """Raises `WatchExpired` for a token of another server, or of this one before it was started again."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise InvalidRequest(f"{token[:100]!r} is no resume token", field="resume_token")
        if match[1] != self._epoch:
            raise WatchExpired("the server was started again since: list the adapters and watch from now on")
        return int(match[2])
