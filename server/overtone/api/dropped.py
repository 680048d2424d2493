"""The subfolders of a watched folder: what is found, and what is known of them, kept so that a restart undoes nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.packs.disk import replace_file, unlink
from overtone.adapters.sources import NAMES

_log = logging.getLogger(__name__)
READY = ".ready"
_BATCH, _BATCH_BYTES = 256, 64 << 20
_MAX_BYTES = 64 << 20
"""Of the file: some hundred thousand subfolders."""


@dataclass(frozen=True, slots=True)
class Found:
    """A subfolder with an adapter's files. mark: changes when they do."""

    mark: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Known:
    """A subfolder that was loaded or refused. mark: of its files then; digest: of the version, "" if refused; missed: at
    how many looks in a row it was not there."""

    mark: bytes
    digest: str
    missed: int = 0


class DroppedFile:
    """`file` holds subfolders by their names, all of one look or all of the next one."""

    def __init__(self, file: Path, folder: Path) -> None:
        """folder: the watched one; what the file says of another one is not believed."""
        self._file, self._folder = file, str(folder.resolve())
        self._saved = b""

    def load(self) -> dict[str, Known]:
        """Nothing if the file is not there or cannot be read: then all subfolders are looked at as if they were new."""
        try:
            if not self._file.exists():
                return {}
            with self._file.open("rb") as file:
                self._saved = file.read(_MAX_BYTES)
            facts = json.loads(self._saved)
            if facts["folder"] != self._folder:
                return {}
            return {name: Known(bytes.fromhex(mark), digest) for name, (mark, digest) in facts["known"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            _log.warning("%s cannot be read, the watched folder is loaded anew: %s", self._file.name, error)
            return {}

    def save(self, known: Mapping[str, Known]) -> None:
        """Raises `StoreFailed`."""
        rows = {name: (each.mark.hex(), each.digest) for name, each in known.items()}
        text = json.dumps({"folder": self._folder, "known": rows}).encode()
        if text == self._saved or len(text) > _MAX_BYTES:
            return
        scratch = self._file.with_name(f".{self._file.name}")
        with operation("remember what the watched folder holds"):
            unlink(scratch)
            replace_file(self._file, text, scratch)
        self._saved = text


def batches(names: list[str], found: Mapping[str, Found]) -> Iterator[dict[str, Found]]:
    """So many at once that their files fit in memory."""
    batch: dict[str, Found] = {}
    nbytes = 0
    for name in names:
        if batch and (len(batch) == _BATCH or nbytes + found[name].nbytes > _BATCH_BYTES):
            yield batch
            batch, nbytes = {}, 0
        batch[name] = found[name]
        nbytes += found[name].nbytes
    if batch:
        yield batch


def files_of(folder: os.DirEntry[str]) -> dict[str, tuple[int, int]]:
    """Size and time of an adapter's files, and of `.ready`: a new one means to look again. Raises `OSError`."""
    try:
        with os.scandir(folder.path) as listing:
            facts = {e.name: e.stat(follow_symlinks=False) for e in listing if e.name in NAMES or e.name == READY}
    except (FileNotFoundError, NotADirectoryError):  # it has just been removed
        return {}
    except PermissionError:  # it is there: reading it says what is wrong
        return {"": (0, 0)}
    found = {name: (each.st_size, each.st_mtime_ns) for name, each in facts.items()}
    return found if found.keys() - {READY} else {}
