"""Where extents lie: against a map of every word."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overtone.kernels.gpu.arena import FreeList

END = 64


class Runs(RuleBasedStateMachine):
    """Words of [begin, END) are owned by at most one run; holes are as long as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.list, self.runs, self.begin = FreeList(32, END), dict[int, int](), 32

    def owner(self) -> list[bool]:
        taken = [False] * END
        for at, size in self.runs.items():
            assert not any(taken[at : at + size])
            taken[at : at + size] = [True] * size
        return taken

    def holes(self) -> list[int]:
        lengths, length = [], 0
        for taken in [*self.owner()[self.begin :], True]:
            if taken and length:
                lengths.append(length)
            length = 0 if taken else length + 1
        return lengths

    @rule(size=st.integers(1, 20))
    def allocate(self, size: int) -> None:
        holes, at = self.holes(), self.list.allocate(size)
        assert (at is None) == (max(holes, default=0) < size)
        if at is not None:
            assert self.begin <= at <= END - size
            self.runs[at] = size

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def move_up(self, data: st.DataObject) -> None:
        """A run that is given back fits where it was or after it."""
        at = data.draw(st.sampled_from(sorted(self.runs)))
        size = self.runs.pop(at)
        self.list.release(at)
        to = self.list.allocate_last(size)
        assert to is not None
        assert to >= at
        self.runs[to] = size

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(self.runs)))
        del self.runs[at]
        self.list.release(at)

    @rule(by=st.integers(0, 16))
    def grow(self, by: int) -> None:
        self.begin = max(0, self.begin - by)
        self.list.grow(self.begin)

    @rule(by=st.integers(0, 16))
    def shrink(self, by: int) -> None:
        self.begin += min(by, self.list.leading)
        self.list.shrink(self.begin)

    @invariant()
    def agrees(self) -> None:
        holes = self.holes()
        assert (self.list.free, self.list.largest) == (sum(holes), max(holes, default=0))
        assert self.list.used == sum(self.runs.values())
        first = self.owner()[self.begin :]
        assert self.list.leading == (first.index(True) if True in first else len(first))


TestRuns = Runs.TestCase
