"""Where native kernels find the cores of the adapters in use: one table a channel, from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels import CsrCore, Frame, PackedDeltas, PackedLayout, PreparedLowRank
from overtone.kernels.native import NO_CORE, low_rank_address, sparse_address
from overtone.models.channels import Channel, Layout, Outline, PreparedTerm


@dataclass(frozen=True, slots=True)
class CoreTable:
    """Where the cores of some adapters lie. cores: (adapters, slots, 4) int64, see `OwnedRows`; slots: by module name."""

    adapters: list[Outline]
    cores: torch.Tensor
    slots: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where the cores of one channel lie in packed buffers. slots: (n,); offsets: (n, 4) int64, bytes from the beginning of
    rows, cols and values, and how many entries, none 0."""

    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]


class NativeCores:
    """The tables of the adapters in use, from step to step. What a step does not ask for, the next one no longer has."""

    def __init__(self) -> None:
        self._rooms: dict[Frame, torch.Tensor] = {}
        self._slots: dict[Channel, dict[str, int]] = {}
        self._placed: WeakKeyDictionary[PackedLayout, dict[Channel, _Placed]] = WeakKeyDictionary()
        self._tables: dict[Channel, CoreTable] = {}
        self._used: set[Channel] = set()

    def room(self, frame: Frame, numbers: int) -> torch.Tensor:
        """At least so many float32 numbers for spectra: as they were, unless more are asked for. The system would zero fresh
        memory first."""
        room = self._rooms.get(frame)
        if room is None or room.numel() < numbers:
            room = self._rooms[frame] = torch.empty(numbers)
        return room

    def begin_step(self) -> None:
        self._tables = {channel: table for channel, table in self._tables.items() if channel in self._used}
        self._used = set()

    def table(self, channel: Channel, adapters: list[Outline]) -> CoreTable:
        self._used.add(channel)
        held = self._tables.get(channel)
        if held is None or held.adapters != adapters:  # outlines are equal to themselves alone
            held = self._tables[channel] = self._made(channel, adapters)
        return held

    def _made(self, channel: Channel, adapters: list[Outline]) -> CoreTable:
        slots = self._slots.setdefault(channel, {})
        for one in adapters:
            if channel not in one.addresses:
                one.addresses[channel] = self._addresses(one, channel, slots)
        cores = np.concatenate([_grown(one.addresses[channel], len(slots)) for one in adapters])
        return CoreTable(adapters, torch.from_numpy(cores.reshape(len(adapters), -1, 4)), slots)

    def _addresses(self, one: Outline, channel: Channel, slots: dict[str, int]) -> NDArray[np.int64]:
        """(slots, 4) of the cores of one adapter; gives a slot to each module that has none."""
        packed = one.deltas
        if not isinstance(packed, PackedDeltas):
            return _addresses(one, channel, slots)
        by_channel = self._placed.setdefault(packed.layout, {})
        placed = by_channel.get(channel)
        if placed is None:
            placed = by_channel[channel] = _placed(packed.layout, one.layout, channel, slots)
        bases = *(buffer.data_ptr() for buffer in (packed.patterns.rows, packed.patterns.cols, packed.numbers)), 0
        addresses = np.zeros((len(slots), 4), dtype=np.int64)
        addresses[placed.slots] = placed.offsets + np.array(bases)
        return addresses


def _addresses(one: Outline, channel: Channel, slots: dict[str, int]) -> NDArray[np.int64]:
    """`NativeCores._addresses`, from the terms."""
    found = {}
    for name, channels in one.layout.modules.items():
        if channel in channels:
            found[slots.setdefault(name, len(slots))] = _address(one.modules[name][channel])
    return np.array([found.get(slot, NO_CORE) for slot in range(len(slots))], dtype=np.int64).reshape(-1, 4)


def _placed(packed: PackedLayout, layout: Layout, channel: Channel, slots: dict[str, int]) -> _Placed:
    each = [(name, other) for name, channels in layout.modules.items() for other in channels]  # as `packed.terms`
    of_channel = [at for at, (_, other) in enumerate(each) if other is channel]
    found = np.array([slots.setdefault(each[at][0], len(slots)) for at in of_channel], dtype=np.int64)
    starts, counts = 4 * packed.pattern_starts, packed.counts
    offsets = np.stack((starts, starts, 4 * packed.value_starts, counts), axis=1)[of_channel]
    there = offsets[:, 3] > 0
    return _Placed(found[there], offsets[there])


def _grown(addresses: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    """Other adapters may have come since, with modules that this one has not."""
    missing = slots - len(addresses)
    return np.pad(addresses, ((0, missing), (0, 0))) if missing else addresses


def _address(term: PreparedTerm) -> tuple[int, int, int, int]:
    core = term.core
    if isinstance(core, CsrCore):
        return sparse_address(core.rows, core.cols, core.values)
    assert isinstance(core, PreparedLowRank)
    return low_rank_address(core.down, core.up)
