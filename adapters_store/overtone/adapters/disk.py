"""What of a store is on the disk: its folder, its catalogue and its blobs. Needs no model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from overtone.adapters.catalogue import Catalogue, is_empty
from overtone.adapters.failures import operation
from overtone.adapters.operations import Problem
from overtone.adapters.packs import Blobs, Progress, Remote, StoreFolder, disk
from overtone.adapters.packs.problem import no_progress
from overtone.adapters.records import StoreConfig, StoreStats
from overtone.adapters.residency import Residency
from overtone.errors import ConfigError, StoreCorrupted, StoreFailed

_log = logging.getLogger(__name__)
_CATALOGUE = "catalogue.sqlite3"
_TIDY_BELOW = 2 / 3
"""Packs of which less is alive are rewritten, once the same is true of all packs together."""
_TIDY_BYTES = 64 << 20
"""Garbage in packs that is worth rewriting them for, unasked."""


class StoreDisk:
    """A context manager. Raises `ConfigError` if another process uses the store, or if its catalogue is missing."""

    def __init__(self, config: StoreConfig) -> None:
        with ExitStack() as undo:
            self.folder = StoreFolder(config.root)
            undo.callback(self.folder.close)
            self.catalogue = _open_catalogue(self.folder)
            undo.callback(self.catalogue.close)
            remote = Remote(config.remote_url) if config.remote_url else None
            self.blobs = Blobs(
                self.folder,
                self.catalogue,
                remote,
                pack_bytes=config.pack_bytes,
                disk_bytes=config.disk_bytes,
                upload_age_s=config.upload_age_s,
            )
            undo.callback(self.blobs.close)
            self._closing = undo.pop_all()
        self._disk_budget = config.disk_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def tidy(self, stop: Callable[[], bool]) -> None:
        """Compacts once enough of the packs that are here is garbage; stop: asked again and again."""
        stats = self.blobs.stats()
        here = stats.pack_bytes - stats.evicted_bytes
        # If this much of all is garbage, some pack is at least as bad, and is among those that are compacted.
        if stats.garbage_bytes > max(_TIDY_BYTES, here * (1 - _TIDY_BELOW)):
            self.blobs.compact(_TIDY_BELOW, stop=stop)

    def check(self, deep: bool, progress: Progress = no_progress, *, repair: bool = False) -> list[Problem]:
        """Of the catalogue by itself, and of the files against it. What cannot be read any more is quarantined.

        deep: every blob is read, and what is sound again leaves the quarantine; repair: garbage is removed.
        """
        of_rows = self.catalogue.check(progress)
        found = [Problem(f"catalogue_{one.kind}", "", 0, f"{one.subject}: {one.what}") for one in of_rows]
        files = self.blobs.check(deep=deep, repair=repair, progress=progress)
        damaged = {one.digest for one in files if one.digest and not one.garbage}
        for digest in [*damaged, *(self.catalogue.quarantined() if deep else ())]:
            self._verify(digest)
        return found + [Problem(one.kind, one.digest, one.pack, one.what) for one in files]

    def _verify(self, digest: str) -> None:
        """Quarantines what is broken wherever it is, and lifts the quarantine of what is not, with all that it refers to."""
        try:
            for name in (digest, *self.catalogue.shared_by(digest)):
                self.blobs.read(name)
        except StoreCorrupted:
            self.catalogue.quarantine(digest)
        except StoreFailed as error:
            _log.warning("adapter version %s cannot be verified now: %s", digest[:12], error)
        else:
            self.catalogue.heal(digest)

    def stats(self, residency: Residency | None = None) -> StoreStats:
        """residency: None: nothing is in memory."""
        counts, blobs = self.catalogue.counts(), self.blobs.stats()
        memory = (residency or Residency(0)).stats(counts.adapters)
        return dataclasses.replace(
            memory,
            store_id=self.catalogue.store_id(),
            version_count=counts.versions,
            blob_count=counts.blobs,
            live_bytes=counts.bytes,
            pack_count=blobs.packs,
            quarantined_count=self.catalogue.quarantined_count(),
            disk_bytes=blobs.pack_bytes - blobs.evicted_bytes,
            disk_budget_bytes=self._disk_budget,
            remote_bytes=blobs.remote_bytes,
            pending_pack_count=blobs.remote.pending_packs if blobs.remote else 0,
            failed_pass_count=blobs.remote.failed_passes if blobs.remote else 0,
            fetch_failure_count=blobs.remote.fetch_failures if blobs.remote else 0,
            remote_error=blobs.remote.last_error if blobs.remote else "",
        )

    def backup(self, target: Path, progress: Progress = no_progress) -> None:
        """Copies catalogue and blobs, also those that only object storage has, so that the copy needs none.

        Without the list of what is there: the copy has a name of its own in object storage, and never deletes or overwrites
        what is the original's. The catalogue gets its name last: half a copy is no store. Durable on return. Nothing may
        change the store meanwhile, and `still` holds. Raises `ConfigError` unless `target` is empty or not there.
        """
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty", field="folder")
        with operation("back up the adapter store"):
            root = target / "adapters"
            root.mkdir(parents=True)
            self.catalogue.backup(root / "catalogue.part")
            self.blobs.copy(root, progress)
            disk.sync_file(root / "catalogue.part")
            disk.replace(root / "catalogue.part", root / _CATALOGUE)
            for folder in (root, target, target.absolute().parent):
                disk.sync_folder(folder)


def _open_catalogue(folder: StoreFolder) -> Catalogue:
    path = folder.root / _CATALOGUE
    filled = any(folder.packs.iterdir()) or any(folder.blobs.iterdir())
    if filled and (not path.exists() or is_empty(path)):
        # Going on would take every blob for a leftover and remove it.
        raise ConfigError(
            "the store has adapters but its catalogue is missing or empty: restore it or move packs/ and blobs/ away",
            field="store",
        )
    return Catalogue(path)
