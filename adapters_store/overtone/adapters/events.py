"""Who is told of the store's changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from overtone.adapters.operations import Event, Kind
from overtone.adapters.records import AdapterRecord

_log = logging.getLogger(__name__)


class Events:
    """Thread-safe. Listeners are called one event after another, in the order of their sequence, by the thread that made the
    change: they must be quick, and may not change the store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._subscriptions = self._sequence = 0

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """From now on. Returns what ends it."""
        with self._lock:
            self._subscriptions += 1
            key = self._subscriptions
            self._listeners[key] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        return unsubscribe

    def tell(self, kind: Kind, adapter_id: str, record: AdapterRecord | None = None) -> None:
        """To be called in the order of the changes: by whoever still holds what keeps the next one out."""
        with self._lock:
            self._sequence += 1
            event = Event(self._sequence, kind, record, adapter_id)
            for listener in list(self._listeners.values()):
                try:
                    listener(event)
                except Exception:
                    # The change has happened: who listens badly must not make it look otherwise.
                    _log.exception("a listener failed")
