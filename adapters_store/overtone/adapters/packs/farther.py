"""Blobs from object storage: fetched once for all who ask at the same time, verified, and kept on the disk again."""

from __future__ import annotations

import logging
import math
import threading
import time
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
from overtone.errors import OvertoneError, StoreFailed

_log = logging.getLogger(__name__)
_BELIEVED_S = 60.0


class Farther(Protocol):
    """Where blobs may be that are not on the disk."""

    def fetch(self, digest: str, place: Place) -> bytes | None:
        """The verified blob, None if it is not there. Raises `StoreFailed`, and `StoreCorrupted` if it is broken there."""

    def get(self, digest: str, place: Place) -> bytes | None:
        """The bytes there, right or wrong, and kept nowhere; None if there are none. Raises `StoreFailed`."""

    def part(self, number: int, offset: int, length: int) -> bytes | None:
        """So many bytes of a pack; None if it is not there. Raises `StoreFailed`."""

    def has(self, digest: str, place: Place) -> bool:
        """Whether `fetch` should find it. Raises `StoreFailed`."""

    def has_pack(self, number: int) -> bool:
        """Whether it has the pack just as it was uploaded. Raises `StoreFailed`."""


class Unreachable:
    """Stands for the object storage of a store that has some, but was opened without: what is stored again is kept here."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def fetch(self, digest: str, place: Place) -> bytes | None:
        return self.get(digest, place)

    def get(self, digest: str, place: Place) -> bytes | None:
        if place.pack == OWN_FILE or self._ledger.get(place.pack) is not None:
            message = f"adapter version {digest[:12]} is in object storage, and none is configured"
            raise StoreFailed(message, metadata={"digest": digest})
        return None

    def part(self, number: int, offset: int, length: int) -> bytes | None:
        if self._ledger.get(number) is not None:
            raise StoreFailed(f"pack {number} is in object storage, and none is configured", field="remote")
        return None

    def has(self, digest: str, place: Place) -> bool:
        return False

    def has_pack(self, number: int) -> bool:
        return False


class Fetcher:
    """Thread-safe."""

    def __init__(self, parts: Parts, remote: Remote, grew: Callable[[int], None]) -> None:
        """grew: told of bytes that are on the disk again."""
        self._parts, self._remote, self._grew = parts, remote, grew
        self._lock = threading.Lock()
        self._flights: dict[str, Future[bytes | None]] = {}
        self._lost: set[tuple[str, Place]] = set()
        """Broken in a pack over there: to be written again when they are uploaded again."""
        self._seen: dict[int, float] = {}
        """Pack -> when it was last found there, in seconds."""
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
        if (digest, place) in self._lost or not self._may_have(place):
            return False
        if place.pack != OWN_FILE:
            return self._seen_lately(place.pack)
        stored = self._remote.head(self._parts.ledger.blob_name(digest))
        known = stored is not None and stored.size == (place.length or stored.size)
        return known and not self._parts.ledger.is_lost(digest)

    def _seen_lately(self, number: int) -> bool:
        """`has_pack`, asked once a minute: an import may name thousands of blobs of one pack."""
        now = time.monotonic()
        if now - self._seen.get(number, -math.inf) > _BELIEVED_S:
            if not self.has_pack(number):
                return False
            self._seen[number] = now
        return True

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
        blob = None
        try:
            blob = self.get(digest, place)
            if blob is None:
                self._seen.pop(place.pack, None)
                check_mark(self._parts.ledger, self._remote)
            elif not sound(digest, blob):
                self._parts.folder.set_aside(digest, f"remote-{place.pack}-{place.offset}", blob)
                self._lose(digest, place)
                blob = None
                raise corrupted(digest, "does not match its digest in object storage and was set aside")
        finally:
            with self._lock:
                self.fetched, self.failed = self.fetched + (blob is not None), self.failed + (blob is None)
                if blob is not None:
                    self._lost.discard((digest, place))
        if blob is not None:
            self._keep(digest, place, blob)
        return blob

    def part(self, number: int, offset: int, length: int) -> bytes | None:
        if self._parts.ledger.get(number) is None:
            return None
        return self._remote.get(self._parts.ledger.pack_name(number), offset, length)

    def get(self, digest: str, place: Place) -> bytes | None:
        if place.pack != OWN_FILE:
            return self._remote.get(self._parts.ledger.pack_name(place.pack), place.data, place.length)
        name, length = self._parts.ledger.blob_name(digest), place.length
        if not length:  # older catalogues did not know it
            stored = self._remote.head(name)
            if stored is None:
                return None
            length = stored.size
        return self._remote.get(name, 0, length)

    def _lose(self, digest: str, place: Place) -> None:
        """So that it is written again when it is stored again. What is there may be all that is left: one bad answer is no
        reason to delete it."""
        if place.pack == OWN_FILE:
            self._parts.ledger.mark_lost(digest, True)
        else:
            with self._lock:
                self._lost.add((digest, place))

    def _keep(self, digest: str, place: Place, blob: bytes) -> None:
        """On the disk again; a disk that refuses does not keep the reader from the blob."""
        try:
            if place.pack == OWN_FILE:
                with self._parts.own.written({digest: blob}):
                    pass
            else:
                with self._parts.writer.appended({digest: blob}) as places:
                    self._parts.index.move([(digest, place, places[digest])])
            self._grew(len(blob))
        except OvertoneError as error:
            _log.warning("adapter version %s is not kept on the disk: %s", digest[:12], error)
