"""The adapters of the sequences that decode together, from step to step: only rows that changed are prepared anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from overtone.kernels import Frame
from overtone.kernels.native import NativeKernels
from overtone.models.channels import Channel, Outline, channels_by_module
from overtone.models.row_plan import STACK_BYTES, RowPlan


class LaneRows:
    """The rows whose adapters use one analysis frame, in an order that changes as little as the batch does.

    rows[i]: the batch's row at place i; outlines[i]: its adapter's. `version` counts the changes.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.outlines: list[Outline] = []
        self.version = 0

    def update(self, wanted: Mapping[int, Outline]) -> None:
        places: list[tuple[int, Outline] | None] = [
            (row, one) if wanted.get(row) is one else None for row, one in zip(self.rows, self.outlines, strict=True)
        ]
        held = {place[0] for place in places if place is not None}
        if len(held) == len(places) == len(wanted):
            return
        waiting = [(row, one) for row, one in wanted.items() if row not in held]
        for i in range(len(places)):
            if places[i] is None and waiting:
                places[i] = waiting.pop(0)
        places += waiting
        filled = _without_holes(places)
        self.rows, self.outlines = [row for row, _ in filled], [one for _, one in filled]
        self.version += 1


def _without_holes(places: list[tuple[int, Outline] | None]) -> list[tuple[int, Outline]]:
    """The last ones moved into the holes."""
    rest = list(places)
    filled: list[tuple[int, Outline]] = []
    i = 0
    while i < len(rest):
        place = rest[i]
        if place is None:
            last = rest.pop()
            if i < len(rest):
                rest[i] = last
            continue
        filled.append(place)
        i += 1
    return filled


class DecodeBatch:
    """Which adapter each decoding row has, and for every module and channel how its cores are applied to all rows.

    modules: module name -> the channels that some row needs there. Plans are made as the modules are reached.
    """

    def __init__(self, device: torch.device, native: NativeKernels | None = None) -> None:
        self._device, self._native = device, native
        self._outlines: list[Outline | None] = []
        self.modules: Mapping[str, Collection[Channel]] = {}
        self._lanes: dict[Frame, LaneRows] = {}
        self._plans: dict[tuple[str, Channel], RowPlan] = {}

    def update(self, outlines: Sequence[Outline | None]) -> None:
        """From now on row t has outlines[t]; None: the base model."""
        if len(outlines) == len(self._outlines) and all(a is b for a, b in zip(outlines, self._outlines, strict=True)):
            return
        self._outlines = list(outlines)
        self.modules = channels_by_module(self.adapters)
        frames = {frame for one in self.adapters for frame in one.layout.frames}
        self._lanes = {frame: self._lanes.get(frame) or LaneRows() for frame in frames}
        for frame, lane in self._lanes.items():
            lane.update(
                {row: one for row, one in enumerate(outlines) if one is not None and frame in one.layout.frames}
            )
        # Nothing of an adapter that left is kept.
        self._plans = {key: plan for key, plan in self._plans.items() if key[1] in self.modules.get(key[0], ())}

    @property
    def adapters(self) -> list[Outline]:
        """All different."""
        return list(dict.fromkeys(one for one in self._outlines if one is not None))

    def lane(self, frame: Frame) -> LaneRows:
        return self._lanes.get(frame) or LaneRows()

    def plan(self, module: str, channel: Channel) -> RowPlan:
        """How the rows of the channel's lane are changed at `module`."""
        key = module, channel
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = RowPlan(self._device, self._native)
        lane = self.lane(channel.analysis)
        if plan.version != lane.version:
            others = sum(other.stacked_bytes for other in self._plans.values() if other is not plan)
            terms = [one.modules.get(module, {}).get(channel) for one in lane.outlines]
            plan.update(terms, max(0, STACK_BYTES - others))
            plan.version = lane.version
        return plan
