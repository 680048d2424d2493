"""Opens the catalogue's file, whatever version of Overtone wrote it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from overtone.adapters.catalogue.connections import Connections, connect
from overtone.adapters.catalogue.migration import Progress, migrate
from overtone.adapters.catalogue.schema import SCHEMA_VERSION
from overtone.adapters.failures import operation
from overtone.errors import ConfigError


def is_empty(path: Path) -> bool:
    """Whether a catalogue that is there has no tables: its first transaction never ended, or the log with it is lost."""
    with operation("open the catalogue"), closing(connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0]) == 0


def open_catalogue(path: Path, progress: Progress) -> Connections:
    """Makes the tables if there are none; older ones are brought up to date, in one transaction.

    Raises `ConfigError` if a newer Overtone wrote the file, `StoreFailed`.
    """
    with operation("open the catalogue"):
        db = connect(path)
        try:
            found = int(db.execute("PRAGMA user_version").fetchone()[0])
            if found > SCHEMA_VERSION:
                message = f"the catalogue has schema {found}, this server knows {SCHEMA_VERSION}"
                raise ConfigError(f"{message}: it was written by a newer one", field="root")
            if found < SCHEMA_VERSION:
                migrate(db, found, progress)
        except BaseException:
            db.close()
            raise
        return Connections(path, db)
