"""Which adapters have the most requests, kept up to date one request at a time."""

from __future__ import annotations


class Leaders:
    """At most `size` ids. One that is in gives way only to one with more requests. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._requests: dict[str, int] = {}
        # Never more than the least of a leader: they only grow.
        self._least = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def ids(self) -> list[str]:
        """The most requests first; among equals by id."""
        return sorted(self._requests, key=lambda adapter_id: (-self._requests[adapter_id], adapter_id))

    def saw(self, adapter_id: str, requests: int) -> None:
        """An adapter has so many requests now."""
        if adapter_id in self._requests or len(self) < self.size:
            self._requests[adapter_id] = requests
        elif self.size and requests > self._least:
            last = min(self._requests, key=self._requests.__getitem__)
            self._least = self._requests[last]
            if requests > self._least:
                del self._requests[last]
                self._requests[adapter_id] = requests

    def remove(self, adapter_id: str) -> bool:
        """Whether it was in: its place is then free for whoever is seen next."""
        self._least = 0
        return self._requests.pop(adapter_id, None) is not None
