"""Blobs from the disk, each verified, none of them kept in memory."""

from __future__ import annotations

import time
from contextlib import suppress

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder, digest_of
from overtone.adapters.packs.handles import Handles
from overtone.adapters.packs.own import OwnFiles
from overtone.adapters.packs.place import HEADER_BYTES, OWN_FILE, Place


class LocalBlobs:
    """What is at a place on this machine. Thread-safe; raises `StoreFailed` where the disk refuses."""

    def __init__(self, folder: StoreFolder, own: OwnFiles, handles: Handles) -> None:
        self._folder, self._own, self._handles = folder, own, handles
        self.used: dict[int, float] = {}
        """Pack -> when somebody last asked for a blob of it, in seconds; own files have it as time of modification."""

    def read(self, digest: str, place: Place) -> bytes | None:
        """The bytes at `place`, right or wrong; None if the file is not there. Too few where a pack ends early."""
        with operation("read an adapter"):
            if place.pack == OWN_FILE:
                return self._own.read(digest)
            try:
                with self._handles.reading(place.pack) as handle:
                    return disk.pread(handle, place.length, place.data)
            except FileNotFoundError:
                return None

    def here(self, digest: str, place: Place) -> bool:
        """Whether the file is there; nothing is read."""
        return (self._folder.own(digest) if place.pack == OWN_FILE else self._folder.pack(place.pack)).exists()

    def mark_used(self, digest: str, place: Place) -> None:
        if place.pack == OWN_FILE:
            with suppress(OSError):  # evicted meanwhile, or on a disk that is read-only
                disk.touch(self._folder.own(digest))
        else:
            self.used[place.pack] = time.time()

    def header(self, place: Place) -> bytes:
        """What is before a blob in a pack. Raises `FileNotFoundError`."""
        with self._handles.reading(place.pack) as handle:
            return disk.pread(handle, HEADER_BYTES, place.offset)

    def set_aside(self, digest: str, place: Place, broken: bytes) -> bytes | None:
        """Keeps what is broken in quarantine/; the blob if it was written anew meanwhile."""
        if place.pack == OWN_FILE:
            return self._own.set_aside(digest)
        self._folder.set_aside(digest, f"{place.pack}-{place.offset}", broken)
        return None


def sound(digest: str, blob: bytes | None) -> bool:
    return blob is not None and digest_of(blob) == digest
