"""What of an import the server has acknowledged, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import click
import numpy as np

_MARK_BYTES = 8
_EVERY = 256
"""Marks that may be lost to a crash: their adapters are sent again, and are unchanged then."""


class Journal:
    """Marks of eight bytes in a file below the user's folder for settings; a context manager. `finish` once all is done."""

    def __init__(self, facts: Mapping[str, object], *, restart: bool) -> None:
        """facts: what makes this import another than all others. restart: forget what is known."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self._path = Path(click.get_app_dir("overtone")) / "imports" / f"{key}.journal"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if restart:
            self._path.unlink(missing_ok=True)
        known = self._path.read_bytes() if self._path.exists() else b""
        whole = known[: len(known) // _MARK_BYTES * _MARK_BYTES]
        self._known = np.sort(np.frombuffer(whole, np.uint64))
        if len(whole) < len(known):
            self._path.write_bytes(whole)
        self._file = self._path.open("ab")
        self._unwritten = 0

    def __contains__(self, mark: bytes) -> bool:
        """Whether an earlier run has it."""
        wanted = np.frombuffer(mark, np.uint64)[0]
        at = int(np.searchsorted(self._known, wanted))
        return at < len(self._known) and bool(self._known[at] == wanted)

    def add(self, mark: bytes) -> None:
        self._file.write(mark)
        self._unwritten += 1
        if self._unwritten == _EVERY:
            self._file.flush()
            self._unwritten = 0

    def finish(self) -> None:
        """Nothing is left to go on with: the next import of this source begins anew."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
