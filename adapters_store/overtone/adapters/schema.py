"""The catalogue's tables."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.errors import ConfigError

SCHEMA_VERSION = 2

_TABLES = """
CREATE TABLE versions (
    digest TEXT PRIMARY KEY, family TEXT NOT NULL, size_bytes INTEGER NOT NULL, resident_bytes INTEGER NOT NULL,
    module_count INTEGER NOT NULL, parameter_count INTEGER NOT NULL, base_model_name_or_path TEXT NOT NULL,
    warnings TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE adapters (
    id TEXT PRIMARY KEY, uid TEXT NOT NULL, digest TEXT NOT NULL REFERENCES versions, pinned INTEGER NOT NULL,
    labels TEXT NOT NULL, create_time INTEGER NOT NULL, update_time INTEGER NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX pinned_adapters ON adapters (digest) WHERE pinned;
CREATE TABLE adapter_versions (
    id TEXT NOT NULL REFERENCES adapters ON DELETE CASCADE, digest TEXT NOT NULL REFERENCES versions,
    sequence INTEGER NOT NULL, PRIMARY KEY (id, digest)
) WITHOUT ROWID;
CREATE INDEX versions_in_use ON adapter_versions (digest);
"""

_SINCE_2 = """
ALTER TABLE versions ADD COLUMN basis TEXT NOT NULL DEFAULT '';
CREATE TABLE shared_blobs (
    digest TEXT NOT NULL REFERENCES versions ON DELETE CASCADE, shared TEXT NOT NULL, PRIMARY KEY (digest, shared)
) WITHOUT ROWID;
CREATE INDEX shared_blobs_in_use ON shared_blobs (shared);
"""
_STEPS = (_TABLES, _SINCE_2)
"""What takes a catalogue from each version of the schema to the next."""

RECORD_COLUMNS = """
    id, uid, digest, family, pinned, labels, size_bytes, module_count, parameter_count, base_model_name_or_path, warnings,
    basis, create_time, update_time, revision, (
        SELECT json_group_array(digest) FROM (
            SELECT digest FROM adapter_versions AS v WHERE v.id = adapters.id ORDER BY sequence DESC
        )
    ) FROM adapters JOIN versions USING (digest)
"""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection for any thread, one at a time; makes the tables if there are none.

    Raises `ConfigError` if a newer Overtone wrote the file.
    """
    with operation("open the catalogue"):
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                db.execute(f"PRAGMA {pragma}")
            _prepare(db)
        except BaseException:
            db.close()
            raise
        return db


def _prepare(db: sqlite3.Connection) -> None:
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > SCHEMA_VERSION:
        message = f"the catalogue has schema {found}, this server knows {SCHEMA_VERSION}: it was written by a newer one"
        raise ConfigError(message, field="root")
    if found < SCHEMA_VERSION:
        steps = " ".join(_STEPS[found:])
        db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
