"""From catalogue rows to records; every function works inside a transaction or a read of its caller."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from overtone.adapters.catalogue.transaction import EPOCH, MICROSECOND
from overtone.adapters.catalogue.types import Resolved
from overtone.adapters.records import AdapterRecord, AdapterState
from overtone.adapters.text import shown
from overtone.errors import AdapterNotFound, EtagMismatch, InvalidRequest

_RECORD = """
    SELECT a.id, a.uid, b.digest, c.family, a.pinned, a.labels, b.length, k.module_count, k.parameter_count,
        k.base_model_name_or_path, k.warnings, k.basis, c.base_fingerprint, a.tenant, b.quarantined, a.create_time,
        a.update_time, a.used_time, a.revision, (
            SELECT group_concat(hex(digest)) FROM (
                SELECT x.digest FROM adapter_versions AS v CROSS JOIN blobs AS x ON x.blob = v.version
                WHERE v.adapter = a.adapter ORDER BY v.sequence DESC
            )
        )
    FROM adapters AS a JOIN blobs AS b ON b.blob = a.version JOIN kinds AS k USING (kind)
    JOIN classes AS c ON c.class = k.class
"""
_RESOLVED = "SELECT b.digest, b.resident_bytes, a.tenant, b.quarantined, b.length FROM adapters AS a"


class Stored(NamedTuple):
    """An adapter's own row: what changes of it need."""

    adapter: int
    id: str
    uid: bytes
    version: int
    previous: int | None
    pinned: int
    labels: str | None
    tenant: str | None
    update_time: int
    revision: int

    @property
    def etag(self) -> str:
        return f"{self.uid.hex()}-{self.revision}"


def labels_text(labels: Mapping[str, str]) -> str | None:
    """As a row has them."""
    return json.dumps(dict(labels), ensure_ascii=False, sort_keys=True) if labels else None


def labels_of(text: str | None) -> dict[str, str]:
    return json.loads(text) if text else {}


def stored(db: sqlite3.Connection, ids: Iterable[str]) -> dict[str, Stored]:
    """Those of `ids` that there are."""
    query = (
        "SELECT adapter, id, uid, version, previous, pinned, labels, tenant, update_time, revision FROM adapters "
        "WHERE id IN (SELECT value FROM json_each(?))"
    )
    return {row[1]: Stored(*row) for row in db.execute(query, (json.dumps(list(ids)),))}


def existing(db: sqlite3.Connection, adapter_id: str, etag: str = "") -> Stored:
    """Raises `AdapterNotFound`, and `EtagMismatch` if an etag is given that is not the current one."""
    found = stored(db, [adapter_id]).get(adapter_id)
    if found is None:
        raise unknown(adapter_id)
    _check_etag(adapter_id, etag, found.etag)
    return found


def record(db: sqlite3.Connection, adapter_id: str, etag: str = "") -> AdapterRecord:
    """Raises what `existing` raises."""
    row = db.execute(f"{_RECORD} WHERE a.id = ?", (adapter_id,)).fetchone()
    if row is None:
        raise unknown(adapter_id)
    found = _record(row)
    _check_etag(adapter_id, etag, found.etag)
    return found


def _check_etag(adapter_id: str, etag: str, current: str) -> None:
    if etag and etag != current:
        message = f"the adapter {adapter_id} was changed since {shown(etag)!r}"
        raise EtagMismatch(message, field="etag", metadata={"adapter": adapter_id, "etag": current})


def records(db: sqlite3.Connection, adapters: Iterable[int]) -> list[AdapterRecord]:
    """By their numbers, which exist."""
    query = f"{_RECORD} WHERE a.adapter = ?"
    return [_record(db.execute(query, (adapter,)).fetchone()) for adapter in adapters]


def unknown(adapter_id: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {adapter_id}", metadata={"adapter": adapter_id})


def resolve(db: sqlite3.Connection, adapter_id: str, prefix: str) -> Resolved:
    """The current version, or the one whose digest begins with `prefix`. Raises `AdapterNotFound`, `InvalidRequest`."""
    if not prefix:
        row = db.execute(f"{_RESOLVED} JOIN blobs AS b ON b.blob = a.version WHERE a.id = ?", (adapter_id,)).fetchone()
        if row is None:
            raise unknown(adapter_id)
        return _resolved(row)
    query = (
        f"{_RESOLVED} CROSS JOIN adapter_versions AS v USING (adapter) CROSS JOIN blobs AS b ON b.blob = v.version "
        "WHERE a.id = ? AND b.digest BETWEEN ? AND ? LIMIT 2"
    )
    found = db.execute(query, (adapter_id, *_range(prefix))).fetchall()
    if not found:
        existing(db, adapter_id)
    return _resolved(_the_version(found, adapter_id, prefix))


def previous(db: sqlite3.Connection, adapter_id: str) -> Resolved:
    """The version that was current before the current one. Raises `AdapterNotFound`."""
    row = db.execute(f"{_RESOLVED} JOIN blobs AS b ON b.blob = a.previous WHERE a.id = ?", (adapter_id,)).fetchone()
    if row is None:
        existing(db, adapter_id)
        raise no_previous(adapter_id)
    return _resolved(row)


def no_previous(adapter_id: str) -> AdapterNotFound:
    message = f"the adapter {adapter_id} has no version from before the current one"
    return AdapterNotFound(message, metadata={"adapter": adapter_id})


def find_version(db: sqlite3.Connection, found: Stored, prefix: str) -> int:
    """The number of the kept version whose digest begins with `prefix`. Raises `AdapterNotFound`, `InvalidRequest`."""
    query = (
        "SELECT b.blob FROM adapter_versions AS v CROSS JOIN blobs AS b ON b.blob = v.version "
        "WHERE v.adapter = ? AND b.digest BETWEEN ? AND ? LIMIT 2"
    )
    rows = db.execute(query, (found.adapter, *_range(prefix))).fetchall()
    return int(_the_version(rows, found.id, prefix)[0])


def _the_version(found: list[Any], adapter_id: str, prefix: str) -> Any:
    """The one row among `found`."""
    if not found:
        message = f"the adapter {adapter_id} has no version {prefix}"
        raise AdapterNotFound(message, metadata={"adapter": adapter_id, "version": prefix})
    if len(found) > 1:
        raise InvalidRequest(f"{prefix} begins several versions of {adapter_id}", field="adapter_id")
    return found[0]


def _range(prefix: str) -> tuple[bytes, bytes]:
    """The smallest and the largest digest that begin with hexadecimal digits."""
    return bytes.fromhex(prefix.ljust(64, "0")), bytes.fromhex(prefix.ljust(64, "f"))


def _resolved(row: tuple[bytes, int, str | None, int, int]) -> Resolved:
    digest, resident_bytes, tenant, quarantined, size_bytes = row
    return Resolved(digest.hex(), resident_bytes, tenant or "", _state(quarantined), size_bytes)


def _state(quarantined: int) -> AdapterState:
    return "quarantined" if quarantined else "ready"


def _time(stamp: int) -> datetime:
    return EPOCH + stamp * MICROSECOND


def _record(row: tuple[Any, ...]) -> AdapterRecord:
    (id_, uid, digest, family, pinned, labels, size, modules, parameters, base, warnings, basis, fingerprint, *rest) = (
        row
    )
    tenant, quarantined, created, updated, used, revision, versions = rest
    return AdapterRecord(
        id=id_,
        uid=uid.hex(),
        digest=digest.hex(),
        family=family,
        pinned=bool(pinned),
        labels=labels_of(labels),
        size_bytes=size,
        module_count=modules,
        parameter_count=parameters,
        base_model_name_or_path=base,
        base_fingerprint=fingerprint,
        warnings=tuple(json.loads(warnings)),
        basis=basis,
        tenant=tenant or "",
        state=_state(quarantined),
        create_time=_time(created),
        update_time=_time(updated),
        last_used_time=_time(used) if used else None,
        etag=f"{uid.hex()}-{revision}",
        versions=tuple(versions.lower().split(",")),
    )
