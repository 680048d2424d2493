"""What of an import the server has acknowledged, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Self

import click
import numpy as np

_MARK_BYTES = 8
_EVERY = 256
"""Marks that may be lost to a crash: their adapters are sent again, and are unchanged then."""


class Journal:
    """Marks of eight bytes in a file below the user's folder for settings; a context manager. `finish` once all is done.

    A disk that refuses is told on stderr, and the import goes on without: interrupted, it would send everything again."""

    def __init__(self, facts: Mapping[str, object], *, restart: bool) -> None:
        """facts: what makes this import another than all others. restart: forget what is known."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self._path = Path(click.get_app_dir("overtone")) / "imports" / f"{key}.journal"
        self._file: BinaryIO | None = None
        self._known = np.zeros(0, np.uint64)
        self._unwritten = 0
        try:
            self._open(restart)
        except OSError as error:
            self._give_up(error)

    def _open(self, restart: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if restart:
            self._path.unlink(missing_ok=True)
        known = self._path.read_bytes() if self._path.exists() else b""
        whole = known[: len(known) // _MARK_BYTES * _MARK_BYTES]
        self._known = np.sort(np.frombuffer(whole, np.uint64))
        if len(whole) < len(known):
            self._path.write_bytes(whole)
        self._file = self._path.open("ab")

    def _give_up(self, error: OSError) -> None:
        click.echo(f"no journal of this import is kept: {self._path}: {error.strerror}", err=True)
        self._file = None

    def __contains__(self, mark: bytes) -> bool:
        """Whether an earlier run has it."""
        wanted = np.frombuffer(mark, np.uint64)[0]
        at = int(np.searchsorted(self._known, wanted))
        return at < len(self._known) and bool(self._known[at] == wanted)

    def add(self, mark: bytes) -> None:
        if self._file is None:
            return
        self._unwritten += 1
        try:
            self._file.write(mark)
            if self._unwritten == _EVERY:
                self._file.flush()
                self._unwritten = 0
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Nothing is left to go on with: the next import of this source begins anew."""
        self.close()
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
