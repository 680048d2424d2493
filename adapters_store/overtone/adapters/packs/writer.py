"""The end of the packs: records are appended to one of them, the active one, until it is full and the next begins.

Bytes are written under one lock and synced outside of it, so that writers who wait for the disk at the same time share a
sync. Nothing is overwritten that the index may know: a failed write is cut off again, and a pack whose sync failed gets no
more records, because the kernel may have dropped what it could not write.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.place import Place, header_of, padding_of, record_bytes

_log = logging.getLogger(__name__)


@dataclass
class _Pack:
    """Open for appending. `end`: where the next record goes; `synced`: up to where it survives a power cut."""

    number: int
    handle: int
    end: int
    synced: int
    failed: bool = False
    syncing: threading.Lock = field(default_factory=threading.Lock)


class Writer:
    """Thread-safe. A pack is held while somebody has yet to tell the index of records in it: see `holds`."""

    def __init__(self, folder: StoreFolder, known: Sequence[PackFacts], last: int, pack_bytes: int) -> None:
        """known: what recovery found the packs to be; last: the largest number that was ever given to one."""
        self._folder, self._pack_bytes, self._last = folder, pack_bytes, last
        self._lock = threading.Lock()
        self._holders: Counter[int] = Counter()
        self._open: dict[int, _Pack] = {}
        self._active: _Pack | None = None
        if known and known[-1].number == last and known[-1].end < pack_bytes:
            self._resume(known[-1])

    def _resume(self, facts: PackFacts) -> None:
        path = self._folder.pack(facts.number)
        with suppress(FileNotFoundError):
            if disk.size(path) == facts.end:
                self._active = _Pack(facts.number, disk.open_write(path), facts.end, facts.end)
                self._open[facts.number] = self._active

    @contextmanager
    def appended(self, blobs: Mapping[str, bytes]) -> Iterator[dict[str, Place]]:
        """Durable inside, at the places given; until the end of it the packs are held. Raises `StoreFailed`."""
        with operation("write an adapter"), self._lock:
            places = self._write(blobs) if blobs else {}
            packs = [self._open[number] for number in dict.fromkeys(place.pack for place in places.values())]
            ends = [pack.end for pack in packs]
            self._holders.update(pack.number for pack in packs)
        try:
            with operation("write an adapter"):
                for pack, end in zip(packs, ends, strict=True):
                    self._sync(pack, end)
            yield places
        finally:
            with self._lock:
                self._holders -= Counter(pack.number for pack in packs)
                self._close_sealed()

    def _write(self, blobs: Mapping[str, bytes]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        starts: dict[int, int] = {}
        rest = list(blobs.items())
        try:
            while rest:
                pack = self._with_room(len(rest[0][1]))
                starts[pack.number] = pack.end
                count, buffers, end = 0, [], pack.end
                for digest, blob in rest:
                    if end > 0 and end + record_bytes(len(blob)) > self._pack_bytes:
                        break
                    places[digest] = Place(pack.number, end, len(blob))
                    buffers += [header_of(digest, len(blob)), blob, padding_of(len(blob))]
                    count, end = count + 1, places[digest].end
                disk.write_all(pack.handle, buffers, pack.end)
                pack.end, rest = end, rest[count:]
        except OSError:
            self._cut(starts)
            raise
        return places

    def _with_room(self, length: int) -> _Pack:
        """The active pack, or a new one if a blob of `length` bytes does not fit."""
        active = self._active
        if active is not None and (active.end == 0 or active.end + record_bytes(length) <= self._pack_bytes):
            return active
        # Given up even if the new one fails to come: the number is never used again.
        self._last += 1
        path = self._folder.pack(self._last)
        handle = disk.create(path)
        try:
            disk.sync_folder(self._folder.packs)
        except OSError:
            disk.close(handle)
            disk.unlink(path)
            raise
        self._active = self._open[self._last] = _Pack(self._last, handle, 0, 0)
        return self._active

    def _cut(self, starts: Mapping[int, int]) -> None:
        """Takes back what a failed write left. A pack that cannot be cut gets no more records."""
        for number, start in starts.items():
            pack = self._open[number]
            pack.end = start
            try:
                disk.truncate(pack.handle, start)
            except OSError as error:
                _log.warning("pack %d has a broken end and is sealed: %s", number, error.strerror)
                if pack is self._active:
                    self._active = None
        self._close_sealed()

    def _sync(self, pack: _Pack, end: int) -> None:
        with pack.syncing:
            if pack.failed:
                raise OSError(5, "an earlier sync of the same pack failed")
            if pack.synced >= end:
                return
            with self._lock:
                reached = pack.end
            try:
                disk.sync(pack.handle)
            except OSError:
                self._give_up(pack)
                raise
            pack.synced = reached

    def _give_up(self, pack: _Pack) -> None:
        pack.failed = True
        with self._lock:
            if pack is self._active:
                self._active = None
            pack.end = pack.synced
            with suppress(OSError):
                disk.truncate(pack.handle, pack.synced)

    def _close_sealed(self) -> None:
        for pack in list(self._open.values()):
            if pack is not self._active and not self._holders[pack.number]:
                del self._open[pack.number]
                disk.close(pack.handle)
                if pack.end == 0:
                    # What cannot be removed now is removed at the next start.
                    with suppress(OSError):
                        disk.unlink(self._folder.pack(pack.number))

    def holds(self, number: int) -> bool:
        """Whether the pack may yet change, or hold records that the index has yet to hear of."""
        with self._lock:
            return number in self._open

    @property
    def active(self) -> int | None:
        """The number of the pack that grows."""
        with self._lock:
            return self._active.number if self._active is not None else None

    def seal(self) -> None:
        """The active pack gets no more records."""
        with self._lock:
            self._active = None
            self._close_sealed()
