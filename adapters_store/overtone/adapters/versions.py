"""Versions by digest: from a blob on disk to memory and back to nothing. Knows no adapter ids."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.blob import decode
from overtone.adapters.blobs import BlobFolder
from overtone.adapters.catalogue import Catalogue
from overtone.adapters.residency import Residency, ResidentAdapter, make_resident
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
        memory_bytes: int,
        device: torch.device | None,
    ) -> None:
        self.changing = threading.RLock()
        self.on_load: Callable[[float], None] | None = None
        self.residency = Residency(memory_bytes, self._load)
        self._blobs, self._catalogue, self._base, self._device = blobs, catalogue, base, device
        self._doomed: set[str] = set()
        self._closed = False

    def _load(self, digest: str) -> ResidentAdapter:
        start = time.perf_counter()
        stored = decode(self._blobs.read(digest), self._base)
        adapter = make_resident(digest, stored.family, stored.deltas, self._device)
        if self.on_load is not None:
            self.on_load(time.perf_counter() - start)
        return adapter

    @contextmanager
    def held(self, digest: str, nbytes: int) -> Iterator[None]:
        """In memory, and not to be evicted, inside."""
        self.residency.retain(digest)
        try:
            self.residency.load(digest, nbytes)
            yield
        finally:
            self.release(digest)

    def release(self, digest: str) -> None:
        self.residency.release(digest)
        if digest in self._doomed:
            self.sweep(digest)

    def sweep(self, digest: str) -> None:
        """Frees memory and blob of a digest that nothing refers to, or leaves it to the release of its last lease."""
        with self.changing:
            if self._closed:
                return
            try:
                # Doomed before the leases are counted: a release in between then finds it doomed.
                self._doomed.add(digest)
                if self._catalogue.refers_to(digest):
                    self._doomed.discard(digest)
                elif self.residency.drop(digest):
                    self._blobs.remove(digest)
                    self._doomed.discard(digest)
            except OvertoneError as error:
                _log.warning("version %s is left for the next start to remove: %s", digest[:12], error)

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
