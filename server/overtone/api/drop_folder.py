"""A folder of the operator's whose subfolders become adapters by being put there.

A subfolder is loaded under its own name once it is complete: its files are as they were at the look before, or it has a
file `.ready`. What is refused is told in `NAME.error` beside it, until it changes. Meant for thousands of adapters: every
look lists every subfolder.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.operations import ImportItem, ImportResult
from overtone.adapters.sources import mark_of, read_folder
from overtone.adapters.store import AdapterStore
from overtone.api.backend import Backend
from overtone.api.change_log import ChangeLog
from overtone.api.dropped import READY, DroppedFile, Found, Known, batches, files_of
from overtone.errors import AdapterNotFound, EtagMismatch, OvertoneError, StoreFailed

_log = logging.getLogger(__name__)

POLL_S = 1.0


class DropFolder:
    """`look` now and then, from one thread at a time."""

    def __init__(
        self, folder: Path, store: AdapterStore, max_bytes: int, log: ChangeLog, *, delete: bool, memory: Path
    ) -> None:
        """max_bytes: of one adapter; delete: whether an adapter goes with its subfolder, unless somebody else changed it;
        memory: a file that keeps what is known from one process to the next. What was removed while nobody looked stays."""
        self._folder, self._store, self._max_bytes, self._log = folder, store, max_bytes, log
        self._delete = delete
        self._stopped = threading.Event()
        self._identity = self._who()
        self._last: Mapping[str, Found] | None = None
        self._memory = DroppedFile(memory, folder)
        self._known = self._memory.load()

    def stop(self) -> None:
        """For any thread: a look that is under way ends behind what it is loading."""
        self._stopped.set()

    def look(self) -> None:
        """Loads what is complete and new, deletes what is gone. Raises `StoreFailed`; the next look then tries again."""
        found = dict(self._list())
        if self._last is None and self._known and not found:
            raise StoreFailed("the watched folder is empty and was not before the server ended: nothing is forgotten")
        last, self._last = self._last, found
        if last is None:
            self._known = {name: each for name, each in self._known.items() if name in found}
        complete = [
            name
            for name, each in found.items()
            if self._is_new(name, each) and (each == (last or {}).get(name) or self._is_ready(name))
        ]
        try:
            failures = [error for batch in batches(complete, found) for error in self._load(batch)]
            self._forget(found)
        finally:
            self._memory.save(self._known)
        if failures:
            raise failures[0]

    def _who(self) -> tuple[int, int]:
        with operation("find the watched folder"):
            facts = self._folder.stat()
        return facts.st_dev, facts.st_ino

    def _list(self) -> Iterator[tuple[str, Found]]:
        """Subfolders with an adapter's files."""
        if self._who() != self._identity:
            # Most likely a file system that is not mounted any more, and what is missing was not removed.
            raise StoreFailed(
                "the watched folder is another one than at the start: restart the server to watch this one"
            )
        with operation("list the watched folder"), os.scandir(self._folder) as listing:
            for entry in listing:
                if (
                    not entry.name.startswith(".")
                    and entry.is_dir(follow_symlinks=False)
                    and (files := files_of(entry))
                ):
                    nbytes = sum(size for size, _ in files.values())
                    yield entry.name, Found(mark_of(entry.name, files), min(nbytes, self._max_bytes))

    def _is_new(self, name: str, found: Found) -> bool:
        return name not in self._known or self._known[name].mark != found.mark

    def _is_ready(self, name: str) -> bool:
        return (self._folder / name / READY).is_file()

    def _load(self, batch: Mapping[str, Found]) -> list[StoreFailed]:
        """Why some could not be read now, which are left to the next look."""
        if self._stopped.is_set():
            return []
        with self._log.change("DropFolder", None) as change:
            results: dict[str, ImportResult] = {}
            later: list[StoreFailed] = []
            items = [item for name in batch if (item := self._read(name, results, later)) is not None]
            results |= {result.adapter_id: result for result in self._store.import_many(items)}
            for name, result in results.items():
                self._known[name] = Known(batch[name].mark, result.digest)
                self._tell(name, result.error)
                change.fields[result.outcome] = change.fields.get(result.outcome, 0) + 1
            return later

    def _read(self, name: str, refused: dict[str, ImportResult], later: list[StoreFailed]) -> ImportItem | None:
        try:
            return ImportItem(name, read_folder(self._folder / name, self._max_bytes))
        except StoreFailed as error:
            later.append(error)
        except OvertoneError as error:
            refused[name] = ImportResult(name, "", "refused", error)
        return None

    def _tell(self, name: str, error: OvertoneError | None) -> None:
        """Writes what is wrong beside the subfolder, or removes what was. Never through a link of that name."""
        path, part = self._folder / f"{name}.error", self._folder / f".{name}.error"
        try:
            if error is None:
                path.unlink(missing_ok=True)
                return
            where = f" {error.field}:" if error.field else ""
            part.unlink(missing_ok=True)
            with part.open("x", encoding="utf-8") as file:
                file.write(f"{error.reason}:{where} {error.message}\n")
            part.replace(path)
        except OSError as failure:
            _log.warning("cannot write %s: %s", path.name, failure.strerror)

    def _forget(self, found: Mapping[str, Found]) -> None:
        """What is missing twice in a row: it may be on its way to another form. Raises `StoreFailed`."""
        loaded = [name for name, known in self._known.items() if known.digest]
        if self._delete and len(loaded) > 1 and not found:
            raise StoreFailed("everything in the watched folder vanished at once: no adapter is deleted for it")
        for name, known in list(self._known.items()):
            if name in found:
                self._known[name] = replace(known, missed=0)
            elif known.missed == 0:
                self._known[name] = replace(known, missed=1)
            elif not self._stopped.is_set():
                if self._delete and known.digest:
                    self._remove(name, known.digest)
                del self._known[name]
                self._tell(name, None)

    def _remove(self, name: str, digest: str) -> None:
        try:
            record = self._store.get(name)
            if record.digest != digest:
                return
            with self._log.change("DropFolder", None, name) as change:
                change.fields["bytes"] = self._store.delete(name, etag=record.etag).freed_bytes
        except (AdapterNotFound, EtagMismatch):
            return


async def watch_folder(drop: DropFolder, backend: Backend, poll_s: float = POLL_S) -> None:
    """Until it is cancelled. What goes wrong is logged once, until something else happens."""
    before = ""
    while True:
        problem = ""
        try:
            await backend.in_import(drop.look)
        except Exception as error:
            problem = str(error) or type(error).__name__
            if problem != before:
                _log.warning("the watched folder: %s", problem, exc_info=not isinstance(error, OvertoneError))
        before = problem
        await asyncio.sleep(poll_s)
