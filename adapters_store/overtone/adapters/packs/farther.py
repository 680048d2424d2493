"""Blobs from object storage: fetched once for all who ask at the same time, verified, and kept on the disk again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from overtone.adapters.packs.folder import corrupted
from overtone.adapters.packs.ledger import Ledger
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.mark import check_mark
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import OWN_FILE, Place
from overtone.adapters.packs.remote import Remote
from overtone.errors import OvertoneError, StoreCorrupted, StoreFailed

_log = logging.getLogger(__name__)


class Farther(Protocol):
    """Where blobs may be that are not on the disk."""

    def fetch(self, digest: str, place: Place) -> bytes | None:
        """The verified blob, None if it is not there. Raises `StoreFailed`, and `StoreCorrupted` if it is broken there."""

    def has(self, digest: str, place: Place) -> bool:
        """Whether `fetch` should find it. Raises `StoreFailed`."""

    def has_pack(self, number: int) -> bool:
        """Whether it has the pack just as it was uploaded. Raises `StoreFailed`."""


class Unreachable:
    """Stands for the object storage of a store that has some, but was opened without: what is stored again is kept here."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def fetch(self, digest: str, place: Place) -> bytes | None:
        if place.pack == OWN_FILE or self._ledger.get(place.pack) is not None:
            message = f"adapter version {digest[:12]} is in object storage, and none is configured"
            raise StoreFailed(message, metadata={"digest": digest})
        return None

    def has(self, digest: str, place: Place) -> bool:
        return False

    def has_pack(self, number: int) -> bool:
        return False


class Fetcher:
    """Thread-safe."""

    def __init__(self, parts: Parts, remote: Remote, grew: Callable[[int], None]) -> None:
        """grew: told of bytes that are kept on the disk again."""
        self._parts, self._remote, self._grew = parts, remote, grew
        self._lock = threading.Lock()
        self._flights: dict[str, Future[bytes | None]] = {}
        self._lost: set[str] = set()
        """Missing or broken over there: to be written again when they are uploaded again."""
        self.fetched, self.failed = 0, 0
        """How many blobs came, and how many did not."""

    def fetch(self, digest: str, place: Place) -> bytes | None:
        with self._lock:
            leads = digest not in self._flights
            flight = self._flights.setdefault(digest, Future())
        if not leads:
            return flight.result()
        try:
            blob = self._fetch(digest, place)
            flight.set_result(blob)
            return blob
        except BaseException as error:
            flight.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flights[digest]

    def has(self, digest: str, place: Place) -> bool:
        if digest in self._lost or not self._may_have(place):
            return False
        if place.pack != OWN_FILE:
            return True
        stored = self._remote.head(self._parts.ledger.blob_name(digest))
        return stored is not None and stored.size == place.length

    def _may_have(self, place: Place) -> bool:
        ledger = self._parts.ledger
        if place.pack == OWN_FILE:
            return ledger.exists
        # A pack that grows may have been uploaded when it was shorter.
        stored = ledger.get(place.pack)
        return stored is not None and place.end <= stored.size

    def has_pack(self, number: int) -> bool:
        stored = self._parts.ledger.get(number)
        return stored is not None and self._remote.head(self._parts.ledger.pack_name(number)) == stored

    def _fetch(self, digest: str, place: Place) -> bytes | None:
        if self._parts.index.place_of(digest) != place:
            # It came and was kept since the reader looked for it.
            return None
        if not self._may_have(place):
            return None
        if place.pack == OWN_FILE:
            name, offset = self._parts.ledger.blob_name(digest), 0
        else:
            name, offset = self._parts.ledger.pack_name(place.pack), place.data
        try:
            blob = self._remote.get(name, offset, place.length)
            if blob is None:
                check_mark(self._parts.ledger, self._remote)
            if blob is not None and not sound(digest, blob):
                self._parts.folder.set_aside(digest, f"remote-{place.pack}-{place.offset}", blob)
                if place.pack == OWN_FILE:
                    # So that it is uploaded anew when it is stored anew.
                    self._remote.delete(name)
                raise corrupted(digest, "does not match its digest in object storage and was set aside")
        except OvertoneError as error:
            self._count(digest, found=False, lost=isinstance(error, StoreCorrupted))
            raise
        self._count(digest, found=blob is not None, lost=blob is None)
        if blob is not None:
            self._keep(digest, place, blob)
        return blob

    def _count(self, digest: str, *, found: bool, lost: bool) -> None:
        with self._lock:
            self.fetched, self.failed = self.fetched + found, self.failed + (not found)
            (self._lost.add if lost else self._lost.discard)(digest)

    def _keep(self, digest: str, place: Place, blob: bytes) -> None:
        """On the disk again; a disk that refuses does not keep the reader from the blob."""
        self._grew(len(blob))
        try:
            if place.pack == OWN_FILE:
                with self._parts.own.written({digest: blob}):
                    return
            with self._parts.writer.appended({digest: blob}) as places:
                self._parts.index.move([(digest, place, places[digest])])
        except OvertoneError as error:
            _log.warning("adapter version %s is not kept on the disk: %s", digest[:12], error)
