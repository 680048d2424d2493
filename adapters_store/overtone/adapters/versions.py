"""Versions by digest: from a blob on disk to memory and back to nothing. Knows no adapter ids."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical import Sharing, Sparse, decode
from overtone.adapters.catalogue import Catalogue
from overtone.adapters.operations import Deletion
from overtone.adapters.packs import Blobs
from overtone.adapters.residency import ENTRY_BYTES, Residency
from overtone.adapters.resident import ResidentAdapter, SharedOnDevice, Source, make_resident, packed_resident
from overtone.errors import OvertoneError, StoreCorrupted
from overtone.kernels import Delta

_log = logging.getLogger(__name__)


class Versions:
    """Loads, leases and frees versions. `changing`: held by whoever changes what the catalogue refers to.

    A version is freed when the catalogue refers to it no more and its last lease is gone. Loading never takes
    `changing`, so that who holds it may wait for a load.
    """

    def __init__(
        self,
        blobs: Blobs,
        catalogue: Catalogue,
        base: BaseDescription,
        sharing: Sharing,
        memory_bytes: int,
        device: torch.device | None,
    ) -> None:
        self.changing = threading.RLock()
        self.on_load: Callable[[float], None] | None = None
        self.on_freed: Callable[[str], None] | None = None
        self.on_broken: Callable[[str], None] = catalogue.quarantine
        self.residency = Residency(memory_bytes, overhead=ENTRY_BYTES)
        self.on_device = SharedOnDevice(device)
        self._blobs, self._catalogue, self._base, self._sharing = blobs, catalogue, base, sharing
        self._doomed: set[str] = set()
        self._closed = self._pins_wait = False

    def read(self, digest: str) -> ResidentAdapter:
        """A version from disk or object storage, ready to be applied. `on_broken` is told of a broken blob, its own or a
        shared one."""
        start = time.perf_counter()
        try:
            blob, source = self._blobs.read_from(digest)
            stored = decode(blob, self._base, self._sharing)
        except StoreCorrupted as error:
            if broken := error.metadata.get("digest"):  # none for what is computed from the base model
                self.on_broken(broken)
            raise
        adapter = self.made(digest, stored.family, stored.contents, source)
        if self.on_load is not None:
            self.on_load(time.perf_counter() - start)
        return adapter

    def made(
        self, digest: str, family: str, contents: Sparse | Mapping[str, Delta], source: Source = "disk"
    ) -> ResidentAdapter:
        """What was decoded or just admitted, ready to be applied."""
        if not isinstance(contents, Sparse):
            return make_resident(digest, family, contents, self.on_device, source)
        if self.on_device.packs:
            return packed_resident(digest, family, contents.packed, source)
        return make_resident(digest, family, contents.deltas, self.on_device, source)

    @contextmanager
    def held(self, digest: str, nbytes: int, make: Callable[[], ResidentAdapter] | None = None) -> Iterator[None]:
        """In memory, and not to be evicted, inside. make: what brings it there; None: it is read from disk."""
        self.residency.retain(digest)
        try:
            self.residency.load(digest, nbytes, make or partial(self.read, digest))
            yield
        finally:
            self.release(digest)

    def release(self, digest: str) -> None:
        self.residency.release(digest)
        if digest not in self._doomed or not self.changing.acquire(blocking=False):
            return  # one thread releases all leases, and a copy of the store takes long: `catch_up` does it
        try:
            self.sweep([digest])
        finally:
            self.changing.release()

    def sweep(self, digests: Iterable[str]) -> Deletion:
        """Frees memory and blobs of what nothing refers to, or leaves it to the release of its last lease. What cannot be
        freed now is left to `catch_up`."""
        with self.changing:
            if self._closed:
                return Deletion(0, 0, 0)
            digests = tuple(digests)
            # Doomed before the leases are counted: a release in between then finds it doomed.
            self._doomed.update(digests)
            try:
                unused = [digest for digest in digests if not self._catalogue.refers_to(digest)]
                self._doomed.difference_update(set(digests).difference(unused))
                leases = sum(self.residency.leases(digest) for digest in unused)
                free = [digest for digest in unused if self.residency.drop(digest)]
                pending = sum(self._size(digest) for digest in set(unused).difference(free))
                freed = self._release(free)
                if self.on_freed is not None:
                    for digest in free:
                        self.on_freed(digest)
                return Deletion(freed, pending, leases)
            except OvertoneError as error:
                _log.warning("%d versions are left to be removed later: %s", len(digests), error)
                return Deletion(0, 0, 0)

    def _size(self, digest: str) -> int:
        place = self._catalogue.place_of(digest)
        return 0 if place is None else place.length

    def _release(self, digests: list[str]) -> int:
        """Bytes of the blobs that nothing refers to any more, those that these shared among them."""
        try:
            left = self._blobs.release(digests)
        except OvertoneError as error:
            _log.warning("%d versions are left to be removed later: %s", len(digests), error)
            return 0
        self._doomed.difference_update(digests)
        return sum(place.length for _, place in left)

    def follow_pins(self) -> None:
        """Pins in memory what the catalogue says is pinned. Where it cannot be asked now, that is left to `catch_up`."""
        with self.changing:
            try:
                self.residency.set_pinned(self._catalogue.pinned().keys())
            except OvertoneError as error:
                _log.warning("pins are left to be followed later: %s", error)
                self._pins_wait = True
            else:
                self._pins_wait = False

    def catch_up(self) -> None:
        """Does what could not be done when it was due."""
        if not self._pins_wait and not self._doomed:
            return
        with self.changing:
            if self._pins_wait:
                self.follow_pins()
            if due := [digest for digest in self._doomed if not self.residency.leases(digest)]:
                self.sweep(due)

    def load_pinned(self) -> None:
        self.follow_pins()
        for digest, nbytes in self._catalogue.pinned().items():
            try:
                with self.held(digest, nbytes):
                    pass
            except OvertoneError as error:
                # One bad adapter must not keep all others from being served.
                _log.warning("pinned adapter version %s is not in memory: %s", digest[:12], error)

    def close(self) -> None:
        """Leases may still be released afterwards; the next start frees what they leave."""
        with self.changing:
            self._closed = True
