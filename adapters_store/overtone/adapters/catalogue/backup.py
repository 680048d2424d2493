"""A copy of the catalogue, made while others read and write it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path


def backup(db: sqlite3.Connection, path: Path) -> None:
    """Writes what `db` sees into a new file, durably. Raises `OSError`, `sqlite3.Error`; then there is no file."""
    path.touch(exist_ok=False)
    try:
        with closing(sqlite3.connect(path)) as copy:
            db.backup(copy)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        path.unlink()
        raise
