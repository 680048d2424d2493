"""One blob by its digest, from wherever it is, verified at every read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Literal

from overtone.adapters.packs.farther import Farther
from overtone.adapters.packs.folder import corrupted
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import Place
from overtone.errors import StoreFailed

Where = Literal["disk", "remote"]

_REMEMBERED = 4096
"""Digests of blobs that were found sound lately, so that a shared one is not read again with every adapter stored."""


class Reader:
    """Thread-safe."""

    def __init__(self, parts: Parts, farther: Farther | None) -> None:
        self._parts, self._farther = parts, farther
        self._lock = threading.Lock()
        self._sound: OrderedDict[str, None] = OrderedDict()

    def read(self, digest: str) -> tuple[bytes, Where]:
        """The blob, and where it was.

        Raises `StoreCorrupted` if the blob is gone or broken everywhere, `StoreFailed` if it cannot be read now."""
        place = self._parts.index.place_of(digest)
        if place is None:
            raise corrupted(digest, "is missing")
        blob = self._parts.local.read(digest, place)
        if blob is not None and sound(digest, blob):
            self._parts.local.mark_used(digest, place)
            return blob, "disk"
        if self._parts.index.place_of(digest) != place:
            return self.read(digest)  # it moved while we looked for it
        return self._rescue(digest, place, blob)

    def _rescue(self, digest: str, place: Place, broken: bytes | None) -> tuple[bytes, Where]:
        with self._lock:
            self._sound.pop(digest, None)
        if broken is not None and (anew := self._parts.local.set_aside(digest, place, broken)) is not None:
            return anew, "disk"
        fetched = self._farther.fetch(digest, place) if self._farther is not None else None
        if fetched is not None:
            return fetched, "remote"
        if self._parts.index.place_of(digest) != place:
            return self.read(digest)  # somebody else fetched and kept it, or it moved and its pack went from both sides
        what = "is missing" if broken is None else "does not match its digest and was set aside"
        raise corrupted(digest, what)

    def intact(self, digest: str) -> bool:
        """Whether the index has this blob and it need not be written again. Of one that is only remote no byte is read."""
        place = self._parts.index.place_of(digest)
        if place is None:
            return False
        with self._lock:
            known = digest in self._sound
            if known:
                self._sound.move_to_end(digest)
        if known and self._parts.local.here(digest, place):
            return True
        try:
            blob = self._parts.local.read(digest, place)
            if blob is None:
                return self._farther is not None and self._farther.has(digest, place)
        except StoreFailed:
            # Not to be read now: written again, it may be.
            return False
        if found := sound(digest, blob):
            with self._lock:
                self._sound[digest] = None
                if len(self._sound) > _REMEMBERED:
                    self._sound.popitem(last=False)
        return found
