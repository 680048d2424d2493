"""Looks for what cannot be: broken pages, references to nothing, kept counts that counting does not give."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator

from overtone.adapters.catalogue.types import Problem

Progress = Callable[[int, int], None]
"""Told (done, total) checks."""

_USES = "SELECT version AS blob FROM adapter_versions UNION ALL SELECT shared FROM version_shared"

_COUNTS = {
    "uses of a blob": (
        f"SELECT lower(hex(digest)), uses, coalesce(found, 0) FROM blobs LEFT JOIN "
        f"(SELECT blob, count(*) AS found FROM ({_USES}) GROUP BY blob) USING (blob) WHERE uses != coalesce(found, 0)"
    ),
    "uses of a kind": (
        "SELECT kind, uses, found FROM (SELECT k.kind, k.uses, count(b.blob) AS found FROM kinds AS k "
        "LEFT JOIN blobs AS b USING (kind) GROUP BY k.kind) WHERE uses != found"
    ),
    "adapters": "SELECT '', adapters, found FROM counters, (SELECT count(*) AS found FROM adapters) WHERE adapters != found",
    "versions": (
        "SELECT '', versions, found FROM counters, (SELECT count(kind) AS found FROM blobs) WHERE versions != found"
    ),
    "live blobs of a pack": (
        "SELECT pack, live_count, found FROM (SELECT p.pack, live_count, count(b.blob) AS found FROM packs AS p "
        "LEFT JOIN blobs AS b USING (pack) GROUP BY p.pack) WHERE live_count != found"
    ),
    "size of a pack": (
        "SELECT pack, size, found FROM (SELECT p.pack, size, max(start + length) AS found FROM packs AS p "
        "JOIN blobs AS b USING (pack) WHERE p.pack > 0 GROUP BY p.pack) WHERE found > size"
    ),
    "live bytes of a pack": (
        "SELECT pack, live_bytes, found FROM (SELECT p.pack, live_bytes, total(b.length) AS found FROM packs AS p "
        "LEFT JOIN blobs AS b USING (pack) GROUP BY p.pack) WHERE live_bytes != found"
    ),
}
"""Name -> query of (whose, the kept number, the counted one) where they differ."""

_FACTS = {
    "its current version is not among its versions": (
        "SELECT id FROM adapters AS a WHERE NOT EXISTS "
        "(SELECT 1 FROM adapter_versions AS v WHERE v.adapter = a.adapter AND v.version = a.version)"
    ),
    "its version from before is not among its versions": (
        "SELECT id FROM adapters AS a WHERE previous IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM adapter_versions AS v WHERE v.adapter = a.adapter AND v.version = a.previous)"
    ),
    "its size or class is not that of its version": (
        "SELECT id FROM adapters AS a LEFT JOIN blobs AS b ON b.blob = a.version LEFT JOIN kinds AS k USING (kind) "
        "WHERE (a.size_bytes, a.class) IS NOT (b.length, k.class)"
    ),
    "it was created before an older one": (
        "SELECT id FROM (SELECT id, create_time, lag(create_time) OVER (ORDER BY adapter) AS before FROM adapters) "
        "WHERE create_time < before"
    ),
    "the index of labels does not have its labels": (
        "SELECT id FROM adapters AS a WHERE labels IS NOT NULL AND EXISTS (SELECT 1 FROM json_each(a.labels) AS j "
        "WHERE NOT EXISTS (SELECT 1 FROM labels AS l WHERE l.key = j.key AND l.value = j.value AND l.id = a.id))"
    ),
    "the index of labels has labels that it does not have": (
        "SELECT l.id FROM labels AS l LEFT JOIN adapters AS a ON a.id = l.id WHERE NOT EXISTS "
        "(SELECT 1 FROM json_each(coalesce(a.labels, '{}')) AS j WHERE j.key = l.key AND j.value = l.value)"
    ),
}
"""What is wrong -> query of the ids of the adapters with which it is."""


def check(db: sqlite3.Connection, progress: Progress) -> list[Problem]:
    """Raises `sqlite3.Error` where SQLite cannot even try."""
    steps = [_file, _references, *(_count(name) for name in _COUNTS), *(_fact(what) for what in _FACTS)]
    found: list[Problem] = []
    for done, step in enumerate(steps):
        progress(done, len(steps))
        try:
            found.extend(step(db))
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            found.append(Problem("file", "catalogue", str(error)))
    progress(len(steps), len(steps))
    return list(dict.fromkeys(found))


def _file(db: sqlite3.Connection) -> Iterator[Problem]:
    for (what,) in db.execute("PRAGMA integrity_check"):
        if what != "ok":
            yield Problem("file", "catalogue", str(what))


def _references(db: sqlite3.Connection) -> Iterator[Problem]:
    for table, row, parent, _ in db.execute("PRAGMA foreign_key_check"):
        yield Problem("reference", f"{table} {row or ''}".rstrip(), f"refers to a row of {parent} that is not there")


def _count(name: str) -> Callable[[sqlite3.Connection], Iterator[Problem]]:
    def step(db: sqlite3.Connection) -> Iterator[Problem]:
        for whose, kept, counted in db.execute(_COUNTS[name]):
            yield Problem("count", str(whose), f"{name}: {kept} are noted, {int(counted)} are there")

    return step


def _fact(what: str) -> Callable[[sqlite3.Connection], Iterator[Problem]]:
    def step(db: sqlite3.Connection) -> Iterator[Problem]:
        for (adapter_id,) in db.execute(_FACTS[what]):
            yield Problem("facts", str(adapter_id), what)

    return step
