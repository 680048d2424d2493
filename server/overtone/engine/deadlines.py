"""Whose time is up: a heap of deadlines."""

from __future__ import annotations

import heapq
import itertools

from overtone.engine.sequence import Sequence


class Deadlines:
    """Sequences by deadline; one without is never here. O(log n) each, however many end before their time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._live: set[Sequence] = set()
        self._order = itertools.count()

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline is not None:
            self._live.add(sequence)
            heapq.heappush(self._heap, (sequence.request.deadline, next(self._order), sequence))

    def remove(self, sequence: Sequence) -> None:
        """Unknown ones are ignored."""
        self._live.discard(sequence)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[2] in self._live]
            heapq.heapify(self._heap)

    def passed(self, now: float) -> list[Sequence]:
        """Takes out those whose deadline is not after `now`, earliest first."""
        ended: list[Sequence] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence in self._live:
                self._live.remove(sequence)
                ended.append(sequence)
        return ended
