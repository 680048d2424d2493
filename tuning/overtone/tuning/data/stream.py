"""The endless stream of optimiser steps, and its place: what a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from overtone.errors import InvalidRequest
from overtone.tuning.data.collate import Step, steps_of
from overtone.tuning.data.intake import Intake
from overtone.tuning.data.orders import Order
from overtone.tuning.data.types import RawLine, Sample

WINDOW_STEPS = 16
"""Steps whose samples are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Position:
    """epoch: the pass over the data; drawn: lines drawn from it before the window that the next step is in; given: steps of
    that window that were given already."""

    epoch: int = 0
    drawn: int = 0
    given: int = 0

    def state(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Shape:
    """How samples become steps. pad: the token that fills batches up."""

    batch_size: int
    accumulation: int
    by_length: bool
    pad: int
    seed: int

    @property
    def window(self) -> int:
        """Samples that are arranged together."""
        return self.batch_size * self.accumulation * (WINDOW_STEPS if self.by_length else 1)

    def steps_per_epoch(self, samples: int) -> int:
        """No step spans two passes, so the last one of each may be smaller."""
        whole, rest = divmod(samples, self.batch_size * self.accumulation)
        return whole + (rest > 0)


class StepStream:
    """Steps, pass after pass. An iterator for one run; `position` is behind the step that was given last.

    counted: the lines have been counted before. Raises `InvalidRequest` (field data) for a pass without a sample, and at
    the end of data that cannot be read twice.
    """

    def __init__(
        self,
        order: Order,
        intake: Intake,
        shape: Shape,
        *,
        rewindable: bool,
        counted: bool,
        position: Position | None = None,
    ) -> None:
        self._order = order
        self._intake = intake
        self._shape = shape
        self._rewindable = rewindable
        self._counted = counted
        self.position = position or Position()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self._pass()
            if self.position.drawn == 0:
                raise InvalidRequest("data: there is no sample that can be learned from", field="data")
            if not self._rewindable:
                raise InvalidRequest(
                    "data: it ended before the last step and cannot be read again: ask for fewer steps, or give a file",
                    field="data",
                )
            self.position = Position(epoch=self.position.epoch + 1)

    def _pass(self) -> Iterator[dict[str, Any]]:
        """The rest of this pass. A step travels in a dict, which is what transformers' Trainer takes for a batch."""
        epoch = self.position.epoch
        lines = self._order.epoch(epoch, self.position.drawn)
        while True:
            start = self.position.drawn
            samples, drawn = self._window(lines, epoch)
            if not samples:
                return
            for number, step in enumerate(self._arranged(samples, epoch, start)):
                if number >= self.position.given:
                    self.position = Position(epoch, start, number + 1)
                    yield {"step": step}
            self.position = Position(epoch, start + drawn)

    def _window(self, lines: Iterator[RawLine], epoch: int) -> tuple[list[Sample], int]:
        samples: list[Sample] = []
        drawn = 0
        # Lines of a window that was begun before an interruption are in the counts of the checkpoint.
        count = not self._counted and epoch == 0 and self.position.given == 0
        while len(samples) < self._shape.window and (raw := next(lines, None)) is not None:
            drawn += 1
            sample = self._intake.take(raw, count=count)
            if sample is not None:
                samples.append(sample)
        return samples, drawn

    def _arranged(self, samples: list[Sample], epoch: int, start: int) -> list[Step]:
        shape = self._shape
        return steps_of(
            samples,
            batch_size=shape.batch_size,
            accumulation=shape.accumulation,
            pad=shape.pad,
            by_length=f"{shape.seed}:{epoch}:{start}" if shape.by_length else None,
        )
