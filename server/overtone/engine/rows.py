"""Which row of a step each decoding sequence has. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sequence import Sequence


class DecodeRows:
    """Keeps sequences in their rows from step to step: when one leaves, another fills its place, the rest stay.

    What is prepared for the rows of a batch (its adapters' cores) is then prepared anew for the rows that changed alone.
    """

    def __init__(self) -> None:
        self._rows: dict[Sequence, int] = {}

    def forget(self) -> None:
        """Lets go of the sequences of the last plan."""
        self._rows = {}

    def arrange(self, plan: StepPlan) -> StepPlan:
        """`plan` with its decodes in the rows that their sequences had in the plan before."""
        places: list[Chunk | None] = [None] * len(plan.decodes)
        homeless: list[Chunk] = []
        for chunk in plan.decodes:
            row = self._rows.get(chunk.sequence, len(places))
            if row < len(places):
                places[row] = chunk
            else:
                homeless.append(chunk)
        coming = iter(homeless)
        decodes = tuple(next(coming) if chunk is None else chunk for chunk in places)
        self._rows = {chunk.sequence: row for row, chunk in enumerate(decodes)}
        return replace(plan, decodes=decodes)
