"""From catalogue rows to records and back; every function works inside a transaction or read of its caller."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from overtone.adapters.records import AdapterRecord, Version
from overtone.adapters.schema import RECORD_COLUMNS
from overtone.adapters.text import shown
from overtone.errors import AdapterNotFound, EtagMismatch

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def stamp_of(time: datetime) -> int:
    """Whole microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def find(db: sqlite3.Connection, adapter_id: str) -> AdapterRecord | None:
    row = db.execute(f"SELECT {RECORD_COLUMNS} WHERE id = ?", (adapter_id,)).fetchone()
    return None if row is None else _record(row)


def existing(db: sqlite3.Connection, adapter_id: str, etag: str = "") -> AdapterRecord:
    """Raises `AdapterNotFound`, and `EtagMismatch` if an etag is given that is not the current one."""
    record = find(db, adapter_id)
    if record is None:
        raise AdapterNotFound(f"there is no adapter {adapter_id}", metadata={"adapter": adapter_id})
    if etag and etag != record.etag:
        message = f"the adapter {adapter_id} was changed since {shown(etag)!r}"
        raise EtagMismatch(message, field="etag", metadata={"adapter": adapter_id, "etag": record.etag})
    return record


def page(db: sqlite3.Connection, size: int, after: str) -> list[AdapterRecord]:
    query = f"SELECT {RECORD_COLUMNS} WHERE id > ? ORDER BY id LIMIT ?"
    return [_record(row) for row in db.execute(query, (after, size))]


def insert_version(db: sqlite3.Connection, v: Version) -> None:
    """Records a content, once."""
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            v.digest,
            v.family,
            v.size_bytes,
            v.resident_bytes,
            v.module_count,
            v.parameter_count,
            v.base_model_name_or_path,
            json.dumps(v.warnings),
            v.basis,
        ),
    )
    db.executemany(
        "INSERT INTO shared_blobs VALUES (?, ?) ON CONFLICT DO NOTHING", [(v.digest, shared) for shared in v.shared]
    )


def shared_of(db: sqlite3.Connection, digest: str) -> list[str]:
    """Digests of the shared blobs that a version refers to."""
    return [str(row[0]) for row in db.execute("SELECT shared FROM shared_blobs WHERE digest = ?", (digest,))]


def append_version(db: sqlite3.Connection, adapter_id: str, digest: str) -> None:
    """Makes `digest` the newest of an id's versions; content that comes back counts as new again."""
    db.execute(
        "INSERT OR REPLACE INTO adapter_versions "
        "SELECT ?1, ?2, 1 + coalesce(max(sequence), 0) FROM adapter_versions WHERE id = ?1",
        (adapter_id, digest),
    )


def forget_unused(db: sqlite3.Connection, digests: Iterable[str]) -> None:
    """Deletes those of `digests` that no adapter has any more."""
    db.executemany(
        "DELETE FROM versions WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM adapter_versions WHERE digest = ?1)",
        [(digest,) for digest in digests],
    )


def _record(row: tuple[str | int, ...]) -> AdapterRecord:
    (id_, uid, digest, family, pinned, labels, size, modules, parameters, base, warnings, basis, *rest) = row
    created, updated, revision, versions = rest
    return AdapterRecord(
        id=str(id_),
        uid=str(uid),
        digest=str(digest),
        family=str(family),
        pinned=bool(pinned),
        labels=json.loads(str(labels)),
        size_bytes=int(size),
        module_count=int(modules),
        parameter_count=int(parameters),
        base_model_name_or_path=str(base),
        warnings=tuple(json.loads(str(warnings))),
        basis=str(basis),
        create_time=_EPOCH + int(created) * _MICROSECOND,
        update_time=_EPOCH + int(updated) * _MICROSECOND,
        etag=f"{uid}-{revision}",
        versions=tuple(json.loads(str(versions))),
    )
