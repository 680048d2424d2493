"""Whose time is up: a heap of deadlines."""

from __future__ import annotations

import heapq
import itertools

from overtone.engine.sequence import Sequence


class Deadlines:
    """Sequences by deadline; one without is never here. O(log n) each, however many end before their time.

    The heap has numbers alone: an ended sequence, and the adapter that it holds, is let go at once.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._numbers: dict[Sequence, int] = {}
        self._sequences: dict[int, Sequence] = {}
        self._order = itertools.count()

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline is not None:
            number = next(self._order)
            self._numbers[sequence], self._sequences[number] = number, sequence
            heapq.heappush(self._heap, (sequence.request.deadline, number))

    def remove(self, sequence: Sequence) -> None:
        """Unknown ones are ignored."""
        number = self._numbers.pop(sequence, None)
        if number is not None:
            del self._sequences[number]
        if len(self._heap) > 2 * len(self._sequences) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._sequences]
            heapq.heapify(self._heap)

    def passed(self, now: float) -> list[Sequence]:
        """Takes out those whose deadline is not after `now`, earliest first."""
        ended: list[Sequence] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = self._sequences.pop(heapq.heappop(self._heap)[1], None)
            if sequence is not None:
                del self._numbers[sequence]
                ended.append(sequence)
        return ended
