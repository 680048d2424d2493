"""Blobs by their digest: small ones in packs, large ones in files of their own, all of them perhaps in object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.packs.check import Checker
from overtone.adapters.packs.compaction import Compaction, Compactor
from overtone.adapters.packs.copying import Copier
from overtone.adapters.packs.farther import Farther, Unreachable
from overtone.adapters.packs.folder import StoreFolder
from overtone.adapters.packs.index import BlobIndex
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import OWN_FILE, Place
from overtone.adapters.packs.problem import Problem, Progress, no_progress
from overtone.adapters.packs.reader import Reader, Where
from overtone.adapters.packs.remote import Remote
from overtone.adapters.packs.tier import RemoteStats, Tier
from overtone.errors import ConfigError

PACK_BYTES = 256 << 20
OWN_FILE_BYTES = 1 << 20
"""A blob of as many bytes or more is a file of its own."""


@dataclass(frozen=True, slots=True)
class BlobStats:
    """`evicted_packs`: known, and not on the disk; `garbage_bytes`: of those that are; `remote_bytes`: of packs in object
    storage; `remote`: None without."""

    packs: int
    evicted_packs: int
    evicted_bytes: int
    remote_bytes: int
    pack_bytes: int
    live_bytes: int
    garbage_bytes: int
    remote: RemoteStats | None


class Blobs:
    """Thread-safe. `folder` and `index` are its caller's: to be closed after it."""

    def __init__(
        self,
        folder: StoreFolder,
        index: BlobIndex,
        remote: Remote | None = None,
        *,
        pack_bytes: int = PACK_BYTES,
        disk_bytes: int = 0,
        upload_age_s: float = 0.0,
    ) -> None:
        """Removes what an interrupted process left, in time that grows with the number of packs only.

        pack_bytes: a pack as long gets no more records, and a store's packs may differ in it. disk_bytes: what object
        storage safely has is removed from the disk above this, 0: never. upload_age_s: see `Tier`. Raises `StoreFailed`,
        `ConfigError`.
        """
        if disk_bytes and remote is None:
            raise ConfigError("a budget for the disk needs an object storage for the rest", field="disk_bytes")
        self._parts = Parts.recovered(folder, index, pack_bytes)
        self._tier = Tier(self._parts, remote, disk_bytes, upload_age_s) if remote is not None else None
        farther = self._farther()
        self._reader = Reader(self._parts, farther)
        self._checker, self._compactor = Checker(self._parts, farther), Compactor(self._parts)
        self._copier = Copier(self._parts, farther)

    def _farther(self) -> Farther | None:
        if self._tier is not None:
            return self._tier.fetcher
        return Unreachable(self._parts.ledger) if self._parts.ledger.exists else None

    @contextmanager
    def store(self, blobs: Mapping[str, bytes]) -> Iterator[dict[str, Place]]:
        """`with store({digest: blob, ...}) as places:` tell the index of them, inside.

        Inside, the blobs survive a power cut at `places`, and nobody takes what the index does not know yet for garbage;
        afterwards it is. Blobs that the index has, whole, are not written and not among `places`; the caller sees to it
        that the index does not forget them meanwhile. Raises `StoreFailed`, and nothing that was stored before is hurt.
        """
        missing = {digest: blob for digest, blob in blobs.items() if not self._reader.intact(digest)}
        large = {digest: blob for digest, blob in missing.items() if len(blob) >= OWN_FILE_BYTES}
        small = {digest: blob for digest, blob in missing.items() if digest not in large}
        try:
            with self._parts.own.written(large) as own, self._parts.writer.appended(small) as packed:
                yield own | packed
        finally:
            if self._tier is not None:
                self._tier.stored(large, sum(map(len, missing.values())))

    def read(self, digest: str) -> bytes:
        """The blob, verified, while others store, compact and evict.

        Raises `StoreCorrupted` (metadata: digest) if it is gone or not what its name says, and what was found instead is
        in quarantine/; `StoreFailed` if the disk or object storage does not answer now.
        """
        return self._reader.read(digest)[0]

    def read_from(self, digest: str) -> tuple[bytes, Where]:
        """`read`, and where the blob was."""
        return self._reader.read(digest)

    def release(self, digests: Sequence[str]) -> Sequence[tuple[str, Place]]:
        """Has the index forget what nothing refers to, and removes the files; returns (digest, place) of all that left.

        The bytes of those in packs come back by `compact`. Raises what the index raises, and nothing has left then.
        """
        intents = []

        def leaving(places: Sequence[tuple[str, Place]]) -> None:
            if own := [digest for digest, place in places if place.pack == OWN_FILE]:
                with operation("remove an adapter"):
                    intents.append((own, self._parts.folder.write_intent(own)))

        try:
            left = self._parts.index.release(digests, leaving)
        finally:
            for own, intent in intents:
                self._parts.own.settle(own, intent)
        if self._tier is not None:
            self._tier.stored((digest for own, _ in intents for digest in own), 0)
        return left

    def compact(
        self, below: float = 0.5, progress: Progress = no_progress, stop: Callable[[], bool] = lambda: False
    ) -> Compaction:
        """See `Compactor.compact`; progress counts bytes of packs. Raises `StoreFailed`, and nothing is lost then."""
        compaction = self._compactor.compact(below, progress, stop)
        if self._tier is not None:
            self._tier.wake()
        return compaction

    def check(self, *, deep: bool = False, repair: bool = False, progress: Progress = no_progress) -> list[Problem]:
        """See `Checker.check`."""
        return self._checker.check(deep, repair, progress)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, no pack is removed: compactions, checks and evictions wait."""
        with self._parts.removing:
            yield

    def copy(self, root: Path, progress: Progress = no_progress) -> None:
        """See `Copier.copy`; to be called inside `still`."""
        self._copier.copy(root, progress)

    def upload(self) -> None:
        """Everything that is committed is in object storage on return. Raises `StoreFailed`; nothing to do without one."""
        if self._tier is not None:
            self._tier.upload()

    def stats(self) -> BlobStats:
        packs = self._parts.index.packs()
        here = {facts.number for facts in packs if self._parts.folder.pack(facts.number).exists()}
        evicted = [facts for facts in packs if facts.number not in here]
        return BlobStats(
            packs=len(packs),
            evicted_packs=len(evicted),
            evicted_bytes=sum(facts.end for facts in evicted),
            remote_bytes=self._parts.ledger.nbytes,
            pack_bytes=sum(facts.end for facts in packs),
            live_bytes=sum(facts.live_bytes for facts in packs),
            garbage_bytes=sum(round(facts.end * (1 - facts.alive)) for facts in packs if facts.number in here),
            remote=self._tier.stats() if self._tier is not None else None,
        )

    def close(self) -> None:
        if self._tier is not None:
            self._tier.close()
        self._parts.writer.seal()
        self._parts.handles.close()
