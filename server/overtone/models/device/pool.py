"""The adapters that lie in device memory: packed, copied beside the computing, kept while there is room.

Where there is room but no hole is long enough, extents are moved together, but never one that the step uses. Where there
is no room, what was used least recently goes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from overtone.models.channels import AdapterDeltas
from overtone.models.device.extents import Packed, Packer
from overtone.models.device.memory import DeviceMemory

_STAGED = 64
"""Adapters that are packed before a step asks for them, at most: those of requests that wait."""
_REMEMBERED = 10_000
"""Adapters of which it is remembered that no kernel here applies them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """An adapter in device memory. begin: its extent's first word; packed: what lies there."""

    begin: int
    packed: Packed

    def directory(self, kind: str) -> int:
        """The word where the directory of a kind begins, -1: it has no such records."""
        at = self.packed.extent.directories.get(kind)
        return -1 if at is None else self.begin + at


@dataclass(frozen=True, slots=True)
class PoolStats:
    """extents: adapters there; nbytes: what they take; uploads, evictions, moves: since the start."""

    extents: int
    nbytes: int
    uploads: int
    evictions: int
    moves: int


class DevicePool:
    """Used by the engine's thread. Keys name contents: equal keys, equal adapters. accept: whether the operators can apply
    an adapter beside those they have seen."""

    def __init__(self, packer: Packer, memory: DeviceMemory, accept: Callable[[Packed], bool] = lambda _: True) -> None:
        self._packer, self._memory, self._accept = packer, memory, accept
        self._there: OrderedDict[Hashable, OnDevice] = OrderedDict()  # least recently used first
        self._unfit: OrderedDict[Hashable, None] = OrderedDict()
        self._staged: OrderedDict[Hashable, Future[Packed | None]] = OrderedDict()
        self._packing = ThreadPoolExecutor(1, "overtone-pack")  # one: a packer is for one thread at a time
        self._uploads = self._evictions = self._moves = 0
        self._freed = self._copied = False
        device = memory.words.words.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def stats(self) -> PoolStats:
        return PoolStats(len(self._there), 4 * self._memory.extents.used, self._uploads, self._evictions, self._moves)

    def stage(self, key: Hashable, deltas: AdapterDeltas) -> None:
        """Packs an adapter that a step is going to ask for, meanwhile."""
        if key in self._there or key in self._unfit or key in self._staged:
            return
        self._staged[key] = self._packing.submit(self._pack, deltas)
        while len(self._staged) > _STAGED:
            self._staged.popitem(last=False)

    def prefetch(self) -> None:
        """Copies what `stage` has packed since, beside the computing, as far as nothing has to go for it."""
        for key in [key for key, one in self._staged.items() if one.done()]:
            packed = self._staged[key].result()
            if packed is None or not self._accept(packed):
                self._refuse(key)
            elif (begin := self._memory.allocate(packed.room)) is not None:
                self._put(key, begin, packed)
            else:
                continue
            del self._staged[key]

    def of(self, wanted: Mapping[Hashable, AdapterDeltas]) -> dict[Hashable, OnDevice | None]:
        """The adapters of one step, in device memory once the current stream gets there. None for those that torch's
        operators have to apply: they have terms that no kernel here applies, or do not fit beside the step's others."""
        for key in wanted:
            if key in self._there:
                self._there.move_to_end(key)
        for key, deltas in wanted.items():
            if key in self._there or key in self._unfit:
                continue
            packed = self._packed(key, deltas)
            if packed is None or not self._accept(packed):
                self._refuse(key)
            elif (begin := self._place(packed.room, wanted.keys())) is not None:
                self._put(key, begin, packed)
        if self._side is not None and self._copied:
            torch.cuda.current_stream().wait_stream(self._side)
            self._copied = False
        return {key: self._there.get(key) for key in wanted}

    def forget(self, key: Hashable) -> None:
        """Frees an adapter, if it is there, that no step will ask for under this key again."""
        self._unfit.pop(key, None)
        if key in self._there:
            self._release(self._there.pop(key))

    def close(self) -> None:
        self._packing.shutdown(cancel_futures=True)

    def _packed(self, key: Hashable, deltas: AdapterDeltas) -> Packed | None:
        staged = self._staged.pop(key, None)
        return (staged or self._packing.submit(self._pack, deltas)).result()

    def _pack(self, deltas: AdapterDeltas) -> Packed | None:
        try:
            return self._packer.pack(deltas)
        except Exception:
            log.exception("an adapter cannot be packed for the device; torch's operators apply it")
            return None

    def _refuse(self, key: Hashable) -> None:
        self._unfit[key] = None
        while len(self._unfit) > _REMEMBERED:
            self._unfit.popitem(last=False)

    def _put(self, key: Hashable, begin: int, packed: Packed) -> None:
        self._there[key] = OnDevice(begin, packed)
        self._uploads += 1
        words = packed.extent.words
        to = self._memory.words.words[begin : begin + len(words)]
        if self._side is None:
            to.copy_(words)
            return
        if self._freed:
            # What lay there before may be read by a step that is still under way.
            self._side.wait_stream(torch.cuda.current_stream())
            self._freed = False
        with torch.cuda.stream(self._side):
            to.copy_(words.pin_memory(), non_blocking=True)
        self._copied = True

    def _place(self, words: int, keep: Set[Hashable]) -> int | None:
        """Room for an extent, evicting what `keep` has not, least recently used first."""
        while (begin := self._memory.allocate(words)) is None:
            if self._memory.extents.free >= words and self._move_together(keep):
                continue
            key = next((key for key in self._there if key not in keep), None)
            if key is None:
                return None
            self._release(self._there.pop(key))
            self._evictions += 1
        return begin

    def _move_together(self, keep: Set[Hashable]) -> bool:
        """Moves extents up, as far as those that `keep` has let them; whether any was moved. In the stream that computes:
        after the steps that read them where they were, before those that read them where they are."""
        moved = False
        movable = [(one.begin, key) for key, one in self._there.items() if key not in keep]
        for begin, key in sorted(movable, key=lambda one: -one[0]):
            packed = self._there[key].packed
            to = self._memory.move_up(begin, packed.room)
            if to != begin:
                words = self._memory.words.words
                words[to : to + packed.room] = words[begin : begin + packed.room].clone()
                self._there[key] = OnDevice(to, packed)
                self._moves += 1
                moved = self._freed = True
        return moved

    def _release(self, gone: OnDevice) -> None:
        self._memory.release(gone.begin)
        self._freed = True
