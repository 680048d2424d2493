"""The adapters that lie in device memory: packed, copied beside the computing, kept while there is room.

Where there is room but no hole is long enough, extents are moved together, but never one that the step uses. Where there
is no room, what was used least recently goes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from overtone.models.channels import AdapterDeltas
from overtone.models.device.extents import Packed, Packer, Use
from overtone.models.device.memory import DeviceMemory

_STAGED = 64
"""Adapters that are packed before a step asks for them, at most: those of requests that wait."""
_LATER = 512
"""Adapters that are packed once there are fewer of those."""
_REMEMBERED = 10_000
"""Adapters of which it is remembered that no kernel here applies them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """An adapter in device memory. begin: its extent's first word; room: its words; directories: of each kind, counted from
    there."""

    begin: int
    room: int
    directories: Mapping[str, int]
    uses: frozenset[Use]

    def directory(self, kind: str) -> int:
        """The word where the directory of a kind begins, -1: it has no such records."""
        at = self.directories.get(kind)
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
        self._using: Set[Hashable] = frozenset()  # by the last step
        self._unfit: OrderedDict[Hashable, None] = OrderedDict()
        self._staged: OrderedDict[Hashable, Future[Packed | None]] = OrderedDict()
        self._later: OrderedDict[Hashable, AdapterDeltas] = OrderedDict()
        self._packing = ThreadPoolExecutor(1, "overtone-pack")  # one: a packer is for one thread at a time
        self._uploads = self._evictions = self._moves = 0
        # freed: something lies open that a step under way may read or write; copied: the side stream has work that the
        # computing one has not waited for; crowded: nothing was freed since something found no room.
        self._freed = self._copied = self._crowded = False
        device = memory.words.words.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def stats(self) -> PoolStats:
        taken = 4 * self._memory.extents.used
        return PoolStats(len(self._there), taken, self._uploads, self._evictions, self._moves)

    def stage(self, key: Hashable, deltas: AdapterDeltas) -> None:
        """Packs an adapter that a step is going to ask for, meanwhile."""
        if key in self._there or key in self._unfit or key in self._staged:
            return
        if len(self._staged) >= _STAGED:
            # What is packed and has found no room may belong to a request that is gone; else it waits for `prefetch` only.
            packed = next((known for known, one in self._staged.items() if one.done()), None) if self._crowded else None
            if packed is None:
                if len(self._later) < _LATER:
                    self._later[key] = deltas
                return
            del self._staged[packed]
        self._staged[key] = self._packing.submit(self._pack, deltas)

    def prefetch(self) -> None:
        """Copies what `stage` has packed since, beside the computing, as far as nothing has to go for it; has packed then
        what was too much before."""
        for key in [key for key, one in self._staged.items() if one.done()]:
            if self._crowded:
                return
            future = self._staged.pop(key)
            packed = future.result()
            if not self._fits(key, packed) or packed is None:
                continue
            begin = self._allocate(packed.room)
            if begin is None:
                self._crowded = True
                self._staged[key] = future
            else:
                self._put(key, begin, packed)
        while self._later and len(self._staged) < _STAGED:
            self.stage(*self._later.popitem(last=False))

    def forget_later(self) -> None:
        """Lets go of what `stage` has not begun to pack: nobody may wait for it any more."""
        self._later.clear()

    def of(self, wanted: Mapping[Hashable, AdapterDeltas]) -> dict[Hashable, OnDevice | None]:
        """The adapters of one step, in device memory once the current stream gets there. None for those that torch's
        operators have to apply: they have terms that no kernel here applies, or do not fit beside the step's others."""
        self._using = wanted.keys()
        for key in wanted:
            if key in self._there:
                self._there.move_to_end(key)
        for key, deltas in wanted.items():
            if key not in self._there and key not in self._unfit:
                self._bring(key, deltas)
        self._see_copies()
        return {key: self._there.get(key) for key in wanted}

    def give_back(self, pages: int) -> None:
        """Evicts adapters from pages that the KV cache has lent, the lowest first, until it has `pages` more or the last
        step used the next."""
        until = self._memory.boundary + pages
        for begin, key in sorted(((one.begin, key) for key, one in self._there.items()), key=lambda one: one[0]):
            enough = self._memory.boundary >= until or begin >= self._memory.own_begin
            if enough or key in self._using:
                return
            self._release(self._there.pop(key))
            self._evictions += 1

    def has(self, key: Hashable) -> bool:
        """For any thread."""
        return key in self._there

    def forget(self, key: Hashable) -> None:
        """Frees an adapter, if it is there. A step that asks for it again brings it again."""
        if key in self._there:
            self._release(self._there.pop(key))

    def close(self) -> None:
        self._packing.shutdown(cancel_futures=True)

    def _bring(self, key: Hashable, deltas: AdapterDeltas) -> None:
        self._later.pop(key, None)
        future = self._staged.pop(key, None) or self._packing.submit(self._pack, deltas)
        packed = future.result()
        if not self._fits(key, packed) or packed is None:
            return
        begin = self._place(packed.room)
        if begin is None:
            self._staged[key] = future  # for the next step
        else:
            self._put(key, begin, packed)

    def _fits(self, key: Hashable, packed: Packed | None) -> bool:
        """Whether the kernels can apply it; if not, that is remembered."""
        try:
            if packed is not None and self._accept(packed):
                return True
        except Exception:  # no memory for what it shares, say: it costs this adapter its speed only
            log.exception("an adapter cannot be brought to the device; torch's operators apply it")
        self._unfit[key] = None
        while len(self._unfit) > _REMEMBERED:
            self._unfit.popitem(last=False)
        return False

    def _pack(self, deltas: AdapterDeltas) -> Packed | None:
        try:
            packed = self._packer.pack(deltas)
            if packed is None or self._side is None:
                return packed
            return replace(packed, extent=replace(packed.extent, words=packed.extent.words.pin_memory()))
        except Exception:
            log.exception("an adapter cannot be packed for the device; torch's operators apply it")
            return None

    def _put(self, key: Hashable, begin: int, packed: Packed) -> None:
        self._there[key] = OnDevice(begin, packed.room, packed.extent.directories, packed.uses)
        self._uploads += 1
        words = packed.extent.words
        to = self._memory.words.words[begin : begin + len(words)]
        if self._side is None:
            to.copy_(words)
            return
        if self._freed:
            # What lay there before may be read, or written, by a step that is still under way.
            self._side.wait_stream(torch.cuda.current_stream())
            self._freed = False
        with torch.cuda.stream(self._side):
            to.copy_(words, non_blocking=True)
        self._copied = True

    def _see_copies(self) -> None:
        """What the current stream does from here on comes after the copies so far."""
        if self._side is not None and self._copied:
            torch.cuda.current_stream().wait_stream(self._side)
            self._copied = False

    def _allocate(self, words: int) -> int | None:
        boundary = self._memory.boundary
        begin = self._memory.allocate(words)
        if self._memory.boundary != boundary:
            self._freed = True  # a page that was lent may be one of a step under way
        return begin

    def _place(self, words: int) -> int | None:
        """Room for an extent, evicting what the step does not use, least recently used first, if that is enough."""
        if (begin := self._allocate(words)) is not None:
            return begin
        idle = [key for key in self._there if key not in self._using]
        reachable = self._memory.reachable + sum(self._there[key].room for key in idle)
        while reachable >= words:
            if self._memory.extents.free >= words and self._move_together():
                pass
            elif idle:
                self._release(self._there.pop(idle.pop(0)))
                self._evictions += 1
            else:
                break
            if (begin := self._allocate(words)) is not None:
                return begin
        return None

    def _move_together(self) -> bool:
        """Moves extents up, as far as those that the step uses let them; whether any was moved. In the stream that computes:
        after the steps that read them where they were, before those that read them where they are."""
        self._see_copies()
        moved = False
        movable = [(one.begin, key) for key, one in self._there.items() if key not in self._using]
        for begin, key in sorted(movable, key=lambda one: -one[0]):
            one = self._there[key]
            to = self._memory.move_up(begin, one.room)
            if to != begin:
                words = self._memory.words.words
                words[to : to + one.room] = words[begin : begin + one.room].clone()
                self._there[key] = replace(one, begin=to)
                self._moves += 1
                moved = self._freed = True
        return moved

    def _release(self, gone: OnDevice) -> None:
        self._memory.release(gone.begin)
        self._freed, self._crowded = True, False
