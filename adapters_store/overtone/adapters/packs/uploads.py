"""Brings object storage to what the index says: sealed packs and own files go there, what is forgotten goes from there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.mark import leave_mark
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.remote import Remote

_log = logging.getLogger(__name__)
_CHUNK = 4 << 20


class Stopped(Exception):
    """The store is being closed in the middle of an upload."""


class Uploader:
    """Used by one thread at a time, but for `stop` and `changed`. Raises `StoreFailed`; then call again later."""

    def __init__(self, parts: Parts, remote: Remote) -> None:
        self._parts, self._remote = parts, remote
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._changed: dict[str, None] = {}
        # Own files of the processes before may be there or not: all are compared once.
        self._groups = list("0123456789abcdef")
        self._marked = self._compared_packs = False
        self.uploaded = 0

    def stop(self) -> None:
        self._stopping.set()

    def changed(self, digests: Iterable[str]) -> None:
        """These own files came or went."""
        with self._lock:
            self._changed.update(dict.fromkeys(digests))

    def run(self, *, active: bool) -> None:
        """active: also what the pack has that still grows."""
        if not self._marked:
            leave_mark(self._parts.ledger, self._remote)
            self._marked = True
        for facts in self.pending(active=active):
            self._upload(facts)
        self._remove_dropped_packs()
        if not self._compared_packs:
            self._remove_unknown_packs()
            self._compared_packs = True
        while self._groups:
            self._compare(self._groups[-1])
            self._groups.pop()
        self._settle_changed()

    def _settle_changed(self) -> None:
        while (digest := next(iter(self._changed), None)) is not None:
            with self._lock:
                del self._changed[digest]
            try:
                self._settle(digest)
            except BaseException:
                self.changed([digest])
                raise

    def pending(self, *, active: bool) -> list[PackFacts]:
        """The packs that are on the disk only, or were shorter when they were uploaded."""
        grows = self._parts.writer.active if active else None
        return [
            facts
            for facts in self._parts.index.packs()
            if facts.live_count
            and (facts.number == grows or not self._parts.writer.holds(facts.number))
            and ((stored := self._parts.ledger.get(facts.number)) is None or stored.size != facts.end)
            and self._parts.folder.pack(facts.number).exists()
        ]

    def pending_bytes(self) -> int:
        """Of packs, the one that grows among them."""
        return sum(facts.end for facts in self.pending(active=True))

    def _upload(self, facts: PackFacts) -> None:
        path, name = self._parts.folder.pack(facts.number), self._parts.ledger.pack_name(facts.number)
        with operation("read a pack"):
            try:
                handle = disk.open_read(path)
            except FileNotFoundError:
                return  # compacted meanwhile
        try:
            if disk.size(path) < facts.end:
                _log.error("pack %d is shorter than it was: see `overtone store fsck`", facts.number)
                return
            stored = self._remote.put(name, self._chunks(handle, facts.end))
        except FileNotFoundError:
            return
        finally:
            disk.close(handle)
        if stored.size != facts.end:
            return  # it is compared again
        self._parts.ledger.put(facts.number, stored)
        self.uploaded += 1

    def _chunks(self, handle: int, end: int) -> Iterator[bytes]:
        for offset in range(0, end, _CHUNK):
            if self._stopping.is_set():
                raise Stopped
            with operation("read a pack"):
                chunk = disk.pread(handle, min(_CHUNK, end - offset), offset)
            yield chunk

    def _remove_dropped_packs(self) -> None:
        # In this order: a pack in the ledger was in the index before.
        numbers = self._parts.ledger.numbers()
        known = {facts.number for facts in self._parts.index.packs()}
        for number in numbers:
            if number not in known:
                self._remote.delete(self._parts.ledger.pack_name(number))
                self._parts.ledger.remove(number)

    def _remove_unknown_packs(self) -> None:
        """Packs of a process that ended between an upload and the ledger."""
        known = {facts.number for facts in self._parts.index.packs()} | set(self._parts.ledger.numbers())
        names = set(map(self._parts.ledger.pack_name, known))
        for name in list(self._remote.names(self._parts.ledger.packs_below)):
            if name not in names:
                self._remote.delete(name)

    def _compare(self, group: str) -> None:
        """All own files whose digests begin with this digit, here and there."""
        there = {name.rpartition("/")[2] for name in self._remote.names(self._parts.ledger.blobs_below(group))}
        here = {digest for _, digest in self._parts.own.files(group) if digest is not None}
        for digest in sorted(there ^ here):
            self._settle(digest)

    def _settle(self, digest: str) -> None:
        if self._stopping.is_set():
            raise Stopped
        name = self._parts.ledger.blob_name(digest)
        place = self._parts.index.place_of(digest)
        if not self._parts.own.needed(digest):
            self._remote.delete(name)
            self._parts.ledger.mark_lost(digest, False)
        elif place is not None:
            with operation("read an adapter"):
                blob = self._parts.own.read(digest)
            if blob is None or not sound(digest, blob):
                return
            there = self._remote.head(name)
            if there is None or there.size != len(blob) or self._parts.ledger.is_lost(digest):
                self._remote.put(name, (blob[at : at + _CHUNK] for at in range(0, len(blob), _CHUNK)))
                self._parts.ledger.mark_lost(digest, False)
                self.uploaded += 1
