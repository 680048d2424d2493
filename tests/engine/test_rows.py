"""Decoding sequences keep their rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overtone.engine.rows import DecodeRows
from overtone.engine.scheduler import Chunk, StepPlan
from support.requests import make_sequence


@given(st.lists(st.sets(st.integers(0, 9)), max_size=12))
def test_as_few_rows_change_as_can_be(steps: list[set[int]]) -> None:
    sequences = [make_sequence(f"r{i}", [1], 1) for i in range(10)]
    rows = DecodeRows()
    before: list[int] = []
    for wanted in steps:
        plan = StepPlan(tuple(Chunk(sequences[i], 1) for i in sorted(wanted)), (), (), 0)
        arranged = [sequences.index(chunk.sequence) for chunk in rows.arrange(plan).decodes]
        assert sorted(arranged) == sorted(wanted)
        for row, i in enumerate(before[: len(arranged)]):
            assert i not in wanted or arranged[row] == i
        before = arranged
