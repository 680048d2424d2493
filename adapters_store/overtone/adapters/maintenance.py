"""A store without a model: what an operator does to one that no server has open."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from overtone.adapters.disk import StoreDisk
from overtone.adapters.operations import Compaction, Problem, Progress
from overtone.adapters.packs.problem import no_progress
from overtone.adapters.records import StoreConfig, StoreStats
from overtone.errors import ConfigError


class Maintenance:
    """A context manager. Raises `ConfigError` if there is no store, or if another process uses it."""

    def __init__(self, root: Path, remote_url: str = "") -> None:
        if not (root / "adapters" / "catalogue.sqlite3").exists():
            raise ConfigError(f"{root} has no adapter store", field="store")
        config = StoreConfig(root=root, memory_bytes=0, max_upload_bytes=0, remote_url=remote_url)
        self._disk = StoreDisk(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.__exit__(kind, error, trace)

    def stats(self) -> StoreStats:
        return self._disk.stats()

    def compact(self, progress: Progress = no_progress, *, below: float = 0.5) -> Compaction:
        """Gives back the disk space of what was deleted."""
        unused = self._disk.catalogue.unused()
        self._disk.blobs.release(unused)
        return self._disk.blobs.compact(below, progress)

    def check(self, deep: bool = False, progress: Progress = no_progress, *, repair: bool = False) -> list[Problem]:
        """What is wrong with the store. repair: what is only garbage is removed."""
        return self._disk.check(deep, progress, repair=repair)

    def backup(self, folder: Path, progress: Progress = no_progress) -> None:
        """Copies the store into an empty folder, from which it can be served."""
        with self._disk.blobs.still():
            self._disk.backup(folder, progress)
