"""Rows of contents: versions and what they share, with the kind of each version."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.packs import Place
from overtone.adapters.records import Kind, Version
from overtone.errors import StoreFailed

_KIND_FACTS = "class, module_count, parameter_count, base_model_name_or_path, warnings, basis"

# One query for thousands of digests, joined to one parameter.
_FIND = """
    WITH RECURSIVE i (n) AS (SELECT 0 WHERE ?2 > 0 UNION ALL SELECT n + 1 FROM i WHERE n + 1 < ?2)
    SELECT digest, blob, length, class, pack, quarantined
    FROM i CROSS JOIN blobs ON digest = substr(?1, 32 * n + 1, 32) LEFT JOIN kinds USING (kind)
"""


@dataclass(frozen=True, slots=True)
class Content:
    """A version that is known: its number and what adapters repeat of it."""

    blob: int
    size_bytes: int
    class_: int


class Contents:
    """The versions of one batch. `insert` must follow the last `uses` that were counted in the transaction."""

    def __init__(self, change: Transaction, places: Mapping[str, Place]) -> None:
        self._change, self._places = change, places
        self._kinds: dict[Kind, tuple[int, int]] = {}
        self._known: dict[str, Content] = {}
        self._known_shared: dict[str, int] = {}
        self._fresh: list[tuple[int, bytes, Place, int | None, int | None]] = []
        self._shares: list[tuple[int, int]] = []
        last = change.db.execute("SELECT max(blob) FROM blobs").fetchone()[0]
        self._next = (last or 0) + 1

    def of(self, versions: Iterable[Version]) -> Mapping[str, Content]:
        """Digest -> content, of these and of those asked for before; rows of what is new follow with `insert`.

        Raises `StoreFailed` for a blob that is neither known nor among the places.
        """
        wanted = {version.digest: version for version in versions if version.digest not in self._known}
        shared = {digest for version in wanted.values() for digest in version.shared} - self._known_shared.keys()
        # In the order of their digests, so that neighbours in the index are read and written together.
        found = self._find(sorted(shared | wanted.keys()))
        for digest in sorted(shared):
            self._known_shared[digest] = found[digest][0] if digest in found else self._add(digest, None, None)
        for digest in sorted(wanted):
            self._known[digest] = Content(*found[digest]) if digest in found else self._new(wanted[digest])
        return self._known

    def insert(self) -> None:
        rows = [
            (blob, digest, place.pack, place.offset, place.length, self._change.uses.pop(blob, 0), kind, resident_bytes)
            for blob, digest, place, kind, resident_bytes in self._fresh
        ]
        self._change.db.executemany("INSERT INTO blobs VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?)", rows)
        self._change.db.executemany("INSERT INTO version_shared VALUES (?, ?)", self._shares)

    def _new(self, version: Version) -> Content:
        kind, class_ = self._kind(version.kind)
        blob = self._add(version.digest, kind, version.resident_bytes)
        self._change.versions += 1
        self._change.kinds[kind] += 1
        for shared in sorted({self._known_shared[digest] for digest in version.shared}):
            self._change.uses[shared] += 1
            self._shares.append((blob, shared))
        return Content(blob, version.size_bytes, class_)

    def _find(self, digests: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        """Digest -> (number, bytes, class) of blobs that are known; from now on they are where the places say, and sound."""
        found = {}
        joined = b"".join(map(bytes.fromhex, digests))
        for digest, blob, length, class_, pack, quarantined in self._change.db.execute(
            _FIND, (joined, len(digests))
        ).fetchall():
            name = digest.hex()
            found[name] = blob, length, class_
            if (place := self._places.get(name)) is not None:
                put_at(self._change, blob, Place(pack, 0, length), place)
            if quarantined:
                lift(self._change, blob)
        return found

    def _add(self, digest: str, kind: int | None, resident_bytes: int | None) -> int:
        place = self._places.get(digest)
        if place is None:
            raise StoreFailed(f"cannot record {digest[:12]}: its content is not stored", metadata={"digest": digest})
        self._fresh.append((self._next, bytes.fromhex(digest), place, kind, resident_bytes))
        self._change.came(place)
        self._next += 1
        return self._next - 1

    def _kind(self, kind: Kind) -> tuple[int, int]:
        """(its number, that of its class)"""
        if kind not in self._kinds:
            self._kinds[kind] = _known_kind(self._change.db, kind)
        return self._kinds[kind]


def lift(change: Transaction, blob: int) -> None:
    """A blob is sound again, so that versions which were broken by it may be too: they are verified when they are loaded."""
    change.db.execute(
        "UPDATE blobs SET quarantined = 0 WHERE quarantined = 1 AND "
        "(blob = ?1 OR EXISTS (SELECT 1 FROM version_shared WHERE version = blob AND shared = ?1))",
        (blob,),
    )


def put_at(change: Transaction, blob: int, old: Place, new: Place) -> None:
    """A known blob is at another place."""
    change.db.execute(
        "UPDATE blobs SET pack = ?, start = ?, length = ? WHERE blob = ?", (new.pack, new.offset, new.length, blob)
    )
    change.left(old.pack, old.length)
    change.came(new)


def _known_kind(db: sqlite3.Connection, kind: Kind) -> tuple[int, int]:
    db.execute(
        "INSERT INTO classes (family, base_fingerprint) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (kind.family, kind.base_fingerprint),
    )
    (class_,) = db.execute(
        "SELECT class FROM classes WHERE family = ? AND base_fingerprint = ?", (kind.family, kind.base_fingerprint)
    ).fetchone()
    facts = (
        class_,
        kind.module_count,
        kind.parameter_count,
        kind.base_model_name_or_path,
        json.dumps(kind.warnings),
        kind.basis,
    )
    db.execute(f"INSERT INTO kinds ({_KIND_FACTS}, uses) VALUES (?, ?, ?, ?, ?, ?, 0) ON CONFLICT DO NOTHING", facts)
    (key,) = db.execute(f"SELECT kind FROM kinds WHERE ({_KIND_FACTS}) = (?, ?, ?, ?, ?, ?)", facts).fetchone()
    return int(key), int(class_)
