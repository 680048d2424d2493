"""From the tables of older versions of Overtone to these: schema 1 had no shared blobs, 2 named everything by text."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from overtone.adapters.catalogue.schema import SCHEMA_VERSION, TABLES

Progress = Callable[[int, int], None]
"""Told (done, total) steps."""

_SINCE_2 = (
    "ALTER TABLE versions ADD COLUMN basis TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE shared_blobs (digest TEXT, shared TEXT, PRIMARY KEY (digest, shared)) WITHOUT ROWID",
)

_OLD_TABLES = ("versions", "adapters", "adapter_versions", "shared_blobs")

_SINCE_3 = (
    "INSERT INTO classes (family, base_fingerprint) SELECT DISTINCT family, '' FROM old_versions",
    """
    INSERT INTO kinds (
        class, module_count, parameter_count, base_model_name_or_path, warnings, basis, uses
    ) SELECT class, module_count, parameter_count, base_model_name_or_path, warnings, basis, count(*)
    FROM old_versions JOIN classes USING (family)
    GROUP BY class, module_count, parameter_count, base_model_name_or_path, warnings, basis
    """,
    """
    INSERT INTO blobs (digest, pack, start, length, quarantined, uses, kind, resident_bytes)
    SELECT from_hex(digest), 0, 0, size_bytes, 0,
        (SELECT count(*) FROM old_adapter_versions AS h WHERE h.digest = v.digest), kind, resident_bytes
    FROM old_versions AS v CROSS JOIN classes AS c USING (family) CROSS JOIN kinds AS k
    ON k.class = c.class AND k.module_count = v.module_count AND k.parameter_count = v.parameter_count
    AND k.base_model_name_or_path = v.base_model_name_or_path AND k.warnings = v.warnings AND k.basis = v.basis
    """,
    """
    INSERT INTO blobs (digest, pack, start, length, quarantined, uses)
    SELECT from_hex(shared), 0, 0, 0, 0, count(*) FROM old_shared_blobs GROUP BY shared
    """,
    """
    INSERT INTO version_shared SELECT v.blob, s.blob FROM old_shared_blobs AS o
    CROSS JOIN blobs AS v ON v.digest = from_hex(o.digest) CROSS JOIN blobs AS s ON s.digest = from_hex(o.shared)
    """,
    """
    INSERT INTO adapters (
        id, uid, version, pinned, labels, create_time, update_time, used_time, revision, size_bytes, class
    ) SELECT id, from_hex(uid), blob, pinned, nullif(labels, '{}'), create_time, update_time, 0, revision, length, class
    FROM old_adapters AS o CROSS JOIN blobs AS b ON b.digest = from_hex(o.digest) CROSS JOIN kinds USING (kind)
    ORDER BY create_time, id
    """,
    """
    INSERT INTO adapter_versions SELECT adapter, sequence, blob FROM old_adapter_versions AS o
    CROSS JOIN adapters USING (id) CROSS JOIN blobs AS b ON b.digest = from_hex(o.digest) ORDER BY adapter, sequence
    """,
    """
    UPDATE adapters SET previous = (
        SELECT version FROM adapter_versions AS v WHERE v.adapter = adapters.adapter ORDER BY sequence DESC LIMIT 1 OFFSET 1
    )
    """,
    "INSERT INTO labels SELECT j.key, j.value, a.id FROM adapters AS a CROSS JOIN json_each(a.labels) AS j",
    "UPDATE packs SET (live_count, live_bytes) = (SELECT count(*), total(length) FROM blobs) WHERE pack = 0",
    "UPDATE counters SET adapters = (SELECT count(*) FROM adapters), versions = (SELECT count(kind) FROM blobs)",
)


def migrate(db: sqlite3.Connection, found: int, progress: Progress) -> None:
    """Makes the tables, from those of schema `found` or, if it is 0, from nothing, all in one transaction."""
    steps = TABLES.split(";\n")[:-1]
    if found:
        aside = [f"ALTER TABLE {table} RENAME TO old_{table}" for table in _OLD_TABLES]
        away = [f"DROP TABLE old_{table}" for table in reversed(_OLD_TABLES)]
        steps = [*(_SINCE_2 if found == 1 else ()), *aside, *steps, *_SINCE_3, *away]
    db.create_function("from_hex", 1, bytes.fromhex, deterministic=True)
    db.execute("BEGIN IMMEDIATE")
    try:
        for done, step in enumerate(steps):
            progress(done, len(steps))
            db.execute(step)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    progress(len(steps), len(steps))
