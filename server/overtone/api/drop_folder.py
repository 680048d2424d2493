"""A folder of the operator's whose subfolders become adapters by being put there.

A subfolder is loaded under its own name once it is complete: its files are as they were at the look before, or it has a
file `.ready`. What is refused is told in `NAME.error` beside it, until it changes. Meant for thousands of adapters: every
look lists every subfolder.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.operations import ImportItem, ImportResult
from overtone.adapters.sources import NAMES, mark_of, read_folder
from overtone.adapters.store import AdapterStore
from overtone.api.backend import Backend
from overtone.api.change_log import ChangeLog
from overtone.errors import AdapterNotFound, OvertoneError

_log = logging.getLogger(__name__)

POLL_S = 1.0
READY = ".ready"
_BATCH = 256


@dataclass(frozen=True, slots=True)
class _Known:
    """A subfolder that was loaded or refused. mark: of its files then; digest: of the version, "" if refused; missed: at
    how many looks in a row it was not there."""

    mark: bytes
    digest: str
    missed: int = 0


class DropFolder:
    """`look` now and then, from one thread at a time."""

    def __init__(self, folder: Path, store: AdapterStore, max_bytes: int, log: ChangeLog, *, delete: bool) -> None:
        """max_bytes: of one adapter; delete: whether an adapter goes with its subfolder, unless somebody else changed it.
        What was removed while nobody looked stays."""
        self._folder, self._store, self._max_bytes, self._log = folder, store, max_bytes, log
        self._delete = delete
        self._last: Mapping[str, bytes] = {}
        self._known: dict[str, _Known] = {}

    def look(self) -> None:
        """Loads what is complete and new, deletes what is gone. Raises `StoreFailed`; the next look then tries again."""
        found = dict(self._list())
        new = [name for name in found if name not in self._known or self._known[name].mark != found[name]]
        complete = [name for name in new if found[name] == self._last.get(name) or self._is_ready(name)]
        self._last = found
        for start in range(0, len(complete), _BATCH):
            self._load({name: found[name] for name in complete[start : start + _BATCH]})
        for name in [name for name in self._known if name not in found]:
            self._miss(name)

    def _list(self) -> Iterator[tuple[str, bytes]]:
        """Subfolders with an adapter's files, and their marks."""
        with operation("list the watched folder"), os.scandir(self._folder) as listing:
            for entry in listing:
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) and (files := _files(entry)):
                    yield entry.name, mark_of(entry.name, files)

    def _is_ready(self, name: str) -> bool:
        return (self._folder / name / READY).is_file()

    def _load(self, marks: Mapping[str, bytes]) -> None:
        with self._log.change("DropFolder", None) as change:
            results: dict[str, ImportResult] = {}
            items = [item for name in marks if (item := self._read(name, results)) is not None]
            results |= {result.adapter_id: result for result in self._store.import_many(items)}
            for name, mark in marks.items():
                self._known[name] = _Known(mark, results[name].digest)
                self._tell(name, results[name].error)
                outcome = results[name].outcome
                change.fields[outcome] = change.fields.get(outcome, 0) + 1

    def _read(self, name: str, refused: dict[str, ImportResult]) -> ImportItem | None:
        try:
            return ImportItem(name, read_folder(self._folder / name, self._max_bytes))
        except OvertoneError as error:
            refused[name] = ImportResult(name, "", "refused", error)
            return None

    def _tell(self, name: str, error: OvertoneError | None) -> None:
        """Writes what is wrong beside the subfolder, or removes what was."""
        path = self._folder / f"{name}.error"
        try:
            if error is None:
                path.unlink(missing_ok=True)
            else:
                where = f" {error.field}:" if error.field else ""
                path.write_text(f"{error.reason}:{where} {error.message}\n", encoding="utf-8")
        except OSError as failure:
            _log.warning("cannot write %s: %s", path.name, failure.strerror)

    def _miss(self, name: str) -> None:
        """It may be on its way to another form: gone is what is missing twice."""
        known = self._known[name]
        if known.missed == 0:
            self._known[name] = _Known(known.mark, known.digest, 1)
            return
        del self._known[name]
        self._tell(name, None)
        if self._delete and known.digest:
            self._remove(name, known.digest)

    def _remove(self, name: str, digest: str) -> None:
        try:
            record = self._store.get(name)
            if record.digest != digest:
                return
            with self._log.change("DropFolder", None, name) as change:
                change.fields["bytes"] = self._store.delete(name, etag=record.etag).freed_bytes
        except AdapterNotFound:
            return


def _files(folder: os.DirEntry[str]) -> dict[str, tuple[int, int]]:
    """Size and time of an adapter's files, and of `.ready`: a new one means to look again."""
    try:
        with os.scandir(folder.path) as listing:
            facts = {e.name: e.stat(follow_symlinks=False) for e in listing if e.name in NAMES or e.name == READY}
    except OSError:  # it has just been removed
        return {}
    found = {name: (each.st_size, each.st_mtime_ns) for name, each in facts.items()}
    return found if found.keys() - {READY} else {}


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
