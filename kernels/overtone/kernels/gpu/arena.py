"""Where extents lie in a run of device memory that can grow at its beginning. Torch-free."""

from __future__ import annotations

import bisect


class FreeList:
    """Hands out runs of [begin, end), the smallest hole that fits first; neighbouring holes become one.

    The run may grow downwards (`grow`) and give back its beginning while that is free (`shrink`): what lies before it
    belongs to somebody else, the KV cache.
    """

    def __init__(self, begin: int, end: int) -> None:
        assert 0 <= begin <= end
        self.begin, self.end = begin, end
        self._holes: list[tuple[int, int]] = [(begin, end)] if begin < end else []  # by beginning
        self._taken: dict[int, int] = {}

    @property
    def free(self) -> int:
        return sum(stop - start for start, stop in self._holes)

    @property
    def used(self) -> int:
        return self.end - self.begin - self.free

    @property
    def largest(self) -> int:
        """The longest run that `allocate` could give."""
        return max((stop - start for start, stop in self._holes), default=0)

    @property
    def leading(self) -> int:
        """How much of the beginning is free."""
        return self._holes[0][1] - self.begin if self._holes and self._holes[0][0] == self.begin else 0

    def allocate(self, size: int) -> int | None:
        """Where a run of `size` begins, None if no hole is long enough. The end of a hole is taken, so that the beginning
        of the whole run stays free."""
        assert size > 0
        fitting = [(stop - start, -start) for start, stop in self._holes if stop - start >= size]
        if not fitting:
            return None
        _, negative = min(fitting)
        return self._take(bisect.bisect_left(self._holes, (-negative,)), size)

    def allocate_last(self, size: int) -> int | None:
        """As `allocate`, but in the last hole that is long enough."""
        at = next((at for at in reversed(range(len(self._holes))) if self._length(at) >= size), None)
        return None if at is None else self._take(at, size)

    def release(self, begin: int) -> None:
        """KeyError: nothing that was allocated begins there."""
        self._insert(begin, begin + self._taken.pop(begin))

    def grow(self, begin: int) -> None:
        """The run now begins at `begin`, before where it did."""
        assert 0 <= begin <= self.begin
        if begin < self.begin:
            former, self.begin = self.begin, begin
            self._insert(begin, former)

    def shrink(self, begin: int) -> None:
        """The run now begins at `begin`; what was before it must be free."""
        assert self.begin <= begin <= self.begin + self.leading
        if begin > self.begin:
            _, stop = self._holes[0]
            self._holes[:1] = [(begin, stop)] if begin < stop else []
            self.begin = begin

    def _length(self, at: int) -> int:
        start, stop = self._holes[at]
        return stop - start

    def _take(self, at: int, size: int) -> int:
        """The end of a hole."""
        start, stop = self._holes[at]
        self._holes[at : at + 1] = [(start, stop - size)] if stop - size > start else []
        self._taken[stop - size] = size
        return stop - size

    def _insert(self, start: int, stop: int) -> None:
        at = bisect.bisect_left(self._holes, (start,))
        if at < len(self._holes) and self._holes[at][0] == stop:
            stop = self._holes.pop(at)[1]
        if at and self._holes[at - 1][1] == start:
            start = self._holes.pop(at - 1)[0]
            at -= 1
        self._holes.insert(at, (start, stop))
