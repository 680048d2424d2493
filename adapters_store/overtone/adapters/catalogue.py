"""Which adapters there are: ids, their versions and options, in SQLite. Knows digests, but neither files nor memory.

A write has happened when its method returns (WAL with synchronous=FULL). Reads have a connection of their own, so that
the start of a request does not wait for a writer's fsync.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from overtone.adapters import rows
from overtone.adapters.failures import operation
from overtone.adapters.records import AdapterRecord, Version
from overtone.adapters.schema import open_database
from overtone.errors import AdapterExists, AdapterNotFound, InvalidRequest


@dataclass(frozen=True)
class Options:
    """What a commit says besides the content. `pinned` and `labels` None: as they are."""

    pinned: bool | None = None
    labels: Mapping[str, str] | None = None
    create_only: bool = False
    validate_only: bool = False


class Catalogue:
    """Thread-safe. Raises `StoreFailed` where SQLite fails, and changes nothing then."""

    def __init__(self, path: Path) -> None:
        self._writer, self._write_lock = open_database(path), threading.Lock()
        self._reader, self._read_lock = open_database(path), threading.Lock()

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _writing(self, what: str, *, keep: bool = True) -> Iterator[sqlite3.Connection]:
        with self._write_lock, operation(what):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT" if keep else "ROLLBACK")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, operation("read the catalogue"):
            yield self._reader

    def put(self, adapter_id: str, version: Version, options: Options) -> AdapterRecord:
        """Makes `version` the current one of an id. Equal content and options change nothing, not even the etag.

        With `validate_only` the same answer, but nothing is kept. Raises `AdapterExists` under `create_only`.
        """
        with self._writing("record an adapter", keep=not options.validate_only) as db:
            old = rows.find(db, adapter_id)
            if old is not None and options.create_only:
                raise already_exists(adapter_id)
            rows.insert_version(db, version)
            if old is None:
                _insert(db, adapter_id, version.digest, options)
            else:
                labels = old.labels if options.labels is None else options.labels
                pinned = old.pinned if options.pinned is None else options.pinned
                _change(db, old, version.digest, pinned, labels)
            if old is None or old.digest != version.digest:
                rows.append_version(db, adapter_id, version.digest)
            return rows.existing(db, adapter_id)

    def update(
        self, adapter_id: str, *, pinned: bool | None, labels: Mapping[str, str] | None, etag: str
    ) -> AdapterRecord:
        """Changes the options that are not None. Raises `AdapterNotFound`, `EtagMismatch`."""
        with self._writing("update an adapter") as db:
            old = rows.existing(db, adapter_id, etag)
            pinned = old.pinned if pinned is None else pinned
            _change(db, old, old.digest, pinned, old.labels if labels is None else labels)
            return rows.existing(db, adapter_id)

    def delete(self, adapter_id: str, etag: str) -> dict[str, list[str]]:
        """Forgets an id; returns the digests that it had, each with its shared blobs.

        Raises `AdapterNotFound`, `EtagMismatch`.
        """
        with self._writing("delete an adapter") as db:
            old = rows.existing(db, adapter_id, etag)
            freed = {digest: rows.shared_of(db, digest) for digest in old.versions}
            db.execute("DELETE FROM adapters WHERE id = ?", (adapter_id,))
            rows.forget_unused(db, old.versions)
            return freed

    def get(self, adapter_id: str, etag: str = "") -> AdapterRecord:
        with self._reading() as db:
            return rows.existing(db, adapter_id, etag)

    def exists(self, adapter_id: str) -> bool:
        with self._reading() as db:
            return rows.find(db, adapter_id) is not None

    def page(self, size: int, after: str) -> list[AdapterRecord]:
        """Up to `size` records with ids above `after`, in the order of their ids."""
        with self._reading() as db:
            return rows.page(db, size, after)

    def resolve(self, adapter_id: str, prefix: str = "") -> tuple[str, int]:
        """(digest, bytes in memory) of the current version, or of the one whose digest begins with `prefix`."""
        versions = "adapter_versions" if prefix else "adapters"
        query = (
            f"SELECT digest, resident_bytes FROM {versions} JOIN versions USING (digest) "
            "WHERE id = ?1 AND substr(digest, 1, length(?2)) = ?2 LIMIT 2"
        )
        with self._reading() as db:
            found = db.execute(query, (adapter_id, prefix)).fetchall()
            if not found:
                rows.existing(db, adapter_id)
                message = f"the adapter {adapter_id} has no version {prefix}"
                raise AdapterNotFound(message, metadata={"adapter": adapter_id, "version": prefix})
        if len(found) > 1:
            raise InvalidRequest(f"{prefix} begins several versions of {adapter_id}", field="adapter_id")
        return str(found[0][0]), int(found[0][1])

    def is_pinned(self, adapter_id: str) -> bool:
        """False also for an id that does not exist."""
        with self._reading() as db:
            record = rows.find(db, adapter_id)
        return record is not None and record.pinned

    def pinned(self) -> dict[str, int]:
        """Digest -> bytes in memory of the current version of every pinned adapter."""
        with self._reading() as db:
            query = "SELECT digest, resident_bytes FROM adapters JOIN versions USING (digest) WHERE pinned"
            return {str(digest): int(size) for digest, size in db.execute(query)}

    def count(self) -> int:
        with self._reading() as db:
            return int(db.execute("SELECT count(*) FROM adapters").fetchone()[0])

    def digests(self) -> set[str]:
        """Of all blobs that are referred to."""
        with self._reading() as db:
            query = "SELECT digest FROM versions UNION SELECT shared FROM shared_blobs"
            return {str(row[0]) for row in db.execute(query)}

    def refers_to(self, digest: str) -> bool:
        with self._reading() as db:
            return db.execute("SELECT 1 FROM versions WHERE digest = ?", (digest,)).fetchone() is not None

    def refers_to_shared(self, digest: str) -> bool:
        with self._reading() as db:
            return db.execute("SELECT 1 FROM shared_blobs WHERE shared = ? LIMIT 1", (digest,)).fetchone() is not None


def already_exists(adapter_id: str) -> AdapterExists:
    return AdapterExists(f"the adapter {adapter_id} exists already", metadata={"adapter": adapter_id})


def _insert(db: sqlite3.Connection, adapter_id: str, digest: str, options: Options) -> None:
    now, labels = rows.stamp_of(datetime.now(UTC)), json.dumps(dict(options.labels or {}))
    row = (adapter_id, uuid.uuid4().hex, digest, bool(options.pinned), labels, now, now)
    db.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, 1)", row)


def _change(db: sqlite3.Connection, old: AdapterRecord, digest: str, pinned: bool, labels: Mapping[str, str]) -> None:
    if (digest, pinned, dict(labels)) == (old.digest, old.pinned, dict(old.labels)):
        return
    # Later than before even if the clock was set back.
    stamp = max(rows.stamp_of(datetime.now(UTC)), rows.stamp_of(old.update_time) + 1)
    db.execute(
        "UPDATE adapters SET digest = ?, pinned = ?, labels = ?, update_time = ?, revision = revision + 1 WHERE id = ?",
        (digest, pinned, json.dumps(dict(labels)), stamp, old.id),
    )
