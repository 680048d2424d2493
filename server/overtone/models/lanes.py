"""Which packed tokens of a step use an analysis frame, and whose adapters they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from overtone.kernels import Frame
from overtone.models.channels import AdapterDeltas, Outline
from overtone.models.decode_batch import DecodeBatch


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed tokens of one request: its decoded token or a chunk of its prompt. None: the base model.

    ahead: how many tokens of the prompt follow in later steps.
    """

    tokens: int
    deltas: AdapterDeltas | None
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chunk of a prompt. span: its rows of the lane; packed: among all tokens; ahead: see `Segment`."""

    span: slice
    packed: slice
    outline: Outline
    ahead: int

    @property
    def tokens(self) -> int:
        return len(range(self.span.start, self.span.stop))

    @property
    def to_come(self) -> int:
        """Tokens that are still to be computed, this chunk's included."""
        return self.tokens + self.ahead


@dataclass(frozen=True, slots=True)
class Lane:
    """The packed tokens whose adapters use one analysis frame: the first `decodes` have an adapter each, then come prompts.

    prompts: in the order of their rows, those with the most tokens to come last; rows: places among all packed tokens, None
    if they are all of them; tokens: how many rows; adapters: all different; owners: (tokens,) int64, whose of them a row is.
    """

    decodes: int
    prompts: Sequence[Prompt]
    rows: torch.Tensor | None
    tokens: int
    adapters: list[Outline]
    owners: torch.Tensor

    def first(self, count: int, device: torch.device) -> torch.Tensor | None:
        """`rows` of the first `count`."""
        if count == self.tokens:
            return self.rows
        return torch.arange(count, device=device) if self.rows is None else self.rows[:count]


class Lanes:
    """The lanes of one step, made when they are asked for. `decoding` tokens come first, then prompts."""

    def __init__(
        self,
        batch: DecodeBatch,
        decoding: int,
        prompts: Sequence[tuple[Segment, Outline | None]],
        device: torch.device,
    ) -> None:
        self._batch, self._decoding, self._prompts, self._device = batch, decoding, prompts, device
        self._packed = decoding + sum(segment.tokens for segment, _ in prompts)
        self._lanes: dict[Frame, Lane] = {}
        self._rows: dict[tuple[int, ...], torch.Tensor | None] = {}

    def of(self, frame: Frame) -> Lane:
        lane = self._lanes.get(frame)
        if lane is None:
            lane = self._lanes[frame] = self._make(frame)
        return lane

    def _make(self, frame: Frame) -> Lane:
        batch = self._batch.lane(frame)
        rows, owners = list(batch.rows), list(batch.outlines)
        prompts = []
        # Those that may be materialised, the longest, last: what is left is then a lane's beginning.
        for packed, one, ahead in sorted(self._using(frame), key=lambda p: p[0].stop - p[0].start + p[2]):
            tokens = packed.stop - packed.start
            prompts.append(Prompt(slice(len(rows), len(rows) + tokens), packed, one, ahead))
            rows += range(packed.start, packed.stop)
            owners += [one] * tokens
        places = {one: place for place, one in enumerate(dict.fromkeys(owners))}
        return Lane(
            len(batch.rows),
            prompts,
            self._places(rows),
            len(rows),
            list(places),
            torch.tensor([places[one] for one in owners], dtype=torch.int64, device=self._device),
        )

    def _using(self, frame: Frame) -> Iterator[tuple[slice, Outline, int]]:
        """The prompts whose adapter uses `frame`: their packed tokens, and how many follow later."""
        start = self._decoding
        for segment, one in self._prompts:
            if one is not None and frame in one.layout.frames:
                yield slice(start, start + segment.tokens), one, segment.ahead
            start += segment.tokens

    def _places(self, rows: list[int]) -> torch.Tensor | None:
        """Lanes of equal rows share one tensor: by its identity gathered inputs are found again."""
        key = tuple(rows)
        if key not in self._rows:
            everything = len(rows) == self._packed and key == tuple(range(self._packed))
            self._rows[key] = None if everything else torch.tensor(rows, dtype=torch.int64, device=self._device)
        return self._rows[key]
