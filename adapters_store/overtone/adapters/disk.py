"""What of a store is on the disk: its folder, its catalogue and its blobs. Needs no model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from overtone.adapters.catalogue import Catalogue
from overtone.adapters.failures import operation
from overtone.adapters.operations import Problem
from overtone.adapters.packs import Blobs, Progress, Remote, StoreFolder
from overtone.adapters.packs.problem import no_progress
from overtone.adapters.records import StoreConfig, StoreStats
from overtone.adapters.residency import Residency
from overtone.errors import ConfigError

_TIDY_BELOW = 0.5
_TIDY_BYTES = 64 << 20
"""Garbage in packs that is worth rewriting them for, unasked."""


class StoreDisk:
    """A context manager. Raises `ConfigError` if another process uses the store, or if its catalogue is missing."""

    def __init__(self, config: StoreConfig) -> None:
        with ExitStack() as undo:
            self.folder = StoreFolder(config.root)
            undo.callback(self.folder.close)
            self.catalogue = Catalogue(_catalogue_path(self.folder))
            undo.callback(self.catalogue.close)
            remote = Remote(config.remote_url) if config.remote_url else None
            self.blobs = Blobs(
                self.folder, self.catalogue, remote, pack_bytes=config.pack_bytes, disk_bytes=config.disk_bytes
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

    def tidy(self) -> None:
        """Compacts once enough is garbage."""
        stats = self.blobs.stats()
        if stats.pack_bytes - stats.live_bytes > max(_TIDY_BYTES, stats.live_bytes * (1 - _TIDY_BELOW)):
            self.blobs.compact(_TIDY_BELOW)

    def check(self, deep: bool, progress: Progress = no_progress, *, repair: bool = False) -> list[Problem]:
        """Of the catalogue by itself, and of the files against it. deep: every blob is read; repair: garbage is removed."""
        found = [
            Problem(f"catalogue_{one.kind}", "", 0, f"{one.subject}: {one.what}") for one in self.catalogue.check()
        ]
        files = self.blobs.check(deep=deep, repair=repair, progress=progress)
        return found + [Problem(one.kind, one.digest, one.pack, one.what) for one in files]

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
        """Copies catalogue and blobs. Nothing may change the store meanwhile. Raises `ConfigError` unless `target` is empty
        or not there."""
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty", field="folder")
        with operation("back up the adapter store"), self.blobs.still():
            root = target / "adapters"
            root.mkdir(parents=True)
            self.catalogue.backup(root / "catalogue.sqlite3")
            files = list(self._files())
            total, done = sum(file.stat().st_size for file in files), 0
            for file in files:
                copy = root / file.relative_to(self.folder.root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                done += file.stat().st_size
                progress(done, total)

    def _files(self) -> Iterator[Path]:
        for folder in (self.folder.packs, self.folder.blobs):
            yield from (file for file in folder.rglob("*") if file.is_file())
        ledger = self.folder.root / "remote.json"
        if ledger.exists():
            yield ledger


def _catalogue_path(folder: StoreFolder) -> Path:
    path = folder.root / "catalogue.sqlite3"
    if not path.exists() and (any(folder.packs.iterdir()) or any(folder.blobs.iterdir())):
        # Going on would take every blob for a leftover and remove it.
        raise ConfigError(
            "the store has adapters but its catalogue is missing: restore it or move packs/ and blobs/ away",
            field="store",
        )
    return path
