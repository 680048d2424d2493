"""Versions by digest: from a blob on disk to memory and back to nothing. Knows no adapter ids."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.blob import decode
from overtone.adapters.blobs import BlobFolder
from overtone.adapters.catalogue import Catalogue
from overtone.adapters.projectors import Projectors
from overtone.adapters.residency import ENTRY_BYTES, Residency
from overtone.adapters.resident import ResidentAdapter, SharedOnDevice, make_resident
from overtone.adapters.shared import SharedBlobs
from overtone.errors import OvertoneError

_log = logging.getLogger(__name__)


class Versions:
    """Loads, leases and frees versions. `changing`: held by whoever changes what the catalogue refers to.

    A version is freed when the catalogue refers to it no more and its last lease is gone. Loading never takes
    `changing`, so that who holds it may wait for a load.
    """

    def __init__(
        self,
        blobs: BlobFolder,
        catalogue: Catalogue,
        base: BaseDescription,
        projectors: Projectors,
        memory_bytes: int,
        device: torch.device | None,
    ) -> None:
        self.changing = threading.RLock()
        self.on_load: Callable[[float], None] | None = None
        self.residency = Residency(memory_bytes, overhead=ENTRY_BYTES)
        self.on_device = SharedOnDevice(device)
        self._blobs, self._catalogue, self._base = blobs, catalogue, base
        self._sharing = SharedBlobs(blobs, projectors)
        # Digest -> the shared blobs that may go with it.
        self._doomed: dict[str, frozenset[str]] = {}
        self._closed = False

    def read(self, digest: str) -> ResidentAdapter:
        """A version from disk, ready to be applied."""
        start = time.perf_counter()
        stored = decode(self._blobs.read(digest), self._base, self._sharing)
        adapter = make_resident(digest, stored.family, stored.deltas, self.on_device)
        if self.on_load is not None:
            self.on_load(time.perf_counter() - start)
        return adapter

    @contextmanager
    def held(self, digest: str, nbytes: int) -> Iterator[None]:
        """In memory, and not to be evicted, inside."""
        self.residency.retain(digest)
        try:
            self.residency.load(digest, nbytes, partial(self.read, digest))
            yield
        finally:
            self.release(digest)

    def release(self, digest: str) -> None:
        self.residency.release(digest)
        if digest in self._doomed:
            self.sweep(digest)

    def sweep(self, digest: str, shared: Iterable[str] = ()) -> None:
        """Frees memory and blob of a digest that nothing refers to, or leaves it to the release of its last lease.

        shared: the shared blobs that it may have been the last to use.
        """
        with self.changing:
            if self._closed:
                return
            try:
                # Doomed before the leases are counted: a release in between then finds it doomed.
                self._doomed[digest] = self._doomed.get(digest, frozenset()) | frozenset(shared)
                if self._catalogue.refers_to(digest):
                    del self._doomed[digest]
                elif self.residency.drop(digest):
                    self._blobs.remove(digest)
                    self._remove_shared(self._doomed.pop(digest))
            except OvertoneError as error:
                _log.warning("version %s is left for the next start to remove: %s", digest[:12], error)

    def _remove_shared(self, candidates: frozenset[str]) -> None:
        still_used = frozenset().union(*self._doomed.values())
        for digest in candidates - still_used:
            if not self._catalogue.refers_to_shared(digest):
                self._blobs.remove(digest)

    def follow_pins(self) -> None:
        """Pins in memory what the catalogue says is pinned."""
        self.residency.set_pinned(self._catalogue.pinned().keys())

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
            if not self._closed:
                self._closed = True
                self._catalogue.close()
                self._blobs.close()
