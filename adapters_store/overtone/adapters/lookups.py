"""What ids mean, and which mean nothing, without asking the catalogue each time.

Never older than the last change that was acknowledged; see `coherent` for the order that every writer keeps. Whoever frees
what a change has made unreachable does so after the change is told here: what `peek` still knows has not been freed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from overtone.adapters.coherent import CoherentCache
from overtone.errors import AdapterNotFound

R = TypeVar("R")

_CURRENT, _WITH_VERSIONS, _MISSING = 1 << 16, 1 << 12, 1 << 13
"""Ids; one takes about 500 bytes."""
_VERSIONS = 8
"""Of one id."""
_MISSING_S = 5.0


class Lookups(Generic[R]):
    """Thread-safe. resolve: asks the catalogue what an id with a digest's prefix means, or raises `AdapterNotFound`."""

    def __init__(
        self,
        resolve: Callable[[str, str], R],
        *,
        missing_seconds: float = _MISSING_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolve = resolve
        self._current = CoherentCache[R](_CURRENT)
        self._versions = CoherentCache[Mapping[str, R]](_WITH_VERSIONS)
        # Id -> how the catalogue says that it is missing.
        self.missing = CoherentCache[str](_MISSING, seconds=missing_seconds, clock=clock)

    def peek(self, adapter_id: str, prefix: str = "") -> R | None:
        """What is known without the catalogue. Raises `AdapterNotFound` if it is known that there is no such id."""
        found = (self._versions.get(adapter_id) or {}).get(prefix) if prefix else self._current.get(adapter_id)
        if found is None and (message := self.missing.get(adapter_id)) is not None:
            raise AdapterNotFound(message, metadata={"adapter": adapter_id})
        return found

    def resolve(self, adapter_id: str, prefix: str = "") -> R:
        """What `resolve` says, or said. Raises what it raises."""
        found = self.peek(adapter_id, prefix)
        return self._ask(adapter_id, prefix) if found is None else found

    def _ask(self, adapter_id: str, prefix: str) -> R:
        current, versions, missing = (c.ticket(adapter_id) for c in (self._current, self._versions, self.missing))
        try:
            found = self._resolve(adapter_id, prefix)
        except AdapterNotFound as error:
            if "version" not in error.metadata:
                self.missing.put(adapter_id, error.message, missing)
            raise
        if prefix:
            known = self._versions.get(adapter_id) or {}
            kept = known if len(known) < _VERSIONS else {}
            self._versions.put(adapter_id, {**kept, prefix: found}, versions)
        else:
            self._current.put(adapter_id, found, current)
        return found

    @contextmanager
    def change(self, *adapter_ids: str) -> Iterator[None]:
        """Around the commit of a change of these ids, whether or not it succeeds."""
        try:
            yield
        finally:
            for cache in (self._current, self._versions, self.missing):
                for adapter_id in adapter_ids:
                    cache.forget(adapter_id)

    def change_all(self) -> None:
        """After the commit of a change of ids that are not known by name."""
        for cache in (self._current, self._versions, self.missing):
            cache.clear()
