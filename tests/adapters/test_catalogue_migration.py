"""Catalogues that older versions of Overtone wrote, made here by their own SQL."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overtone.adapters.catalogue import Catalogue, Counts
from overtone.adapters.catalogue.schema import SCHEMA_VERSION
from overtone.adapters.packs import OWN_FILE, Place
from overtone.adapters.paging import Listing
from overtone.errors import ConfigError, StoreFailed
from support.catalogues import Packer, digest, entry, version

SCHEMA_1 = """
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
SINCE_2 = """
ALTER TABLE versions ADD COLUMN basis TEXT NOT NULL DEFAULT '';
CREATE TABLE shared_blobs (
    digest TEXT NOT NULL REFERENCES versions ON DELETE CASCADE, shared TEXT NOT NULL, PRIMARY KEY (digest, shared)
) WITHOUT ROWID;
CREATE INDEX shared_blobs_in_use ON shared_blobs (shared);
"""

A, B, C = digest("a"), digest("b"), digest("c")
UID = "0123456789abcdef" * 2


def make_old(path: Path, schema: int) -> None:
    """ "x" has C now, then A and B before it; "y" has A, is pinned and was created first."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"PRAGMA journal_mode=WAL; BEGIN; {SCHEMA_1} {SINCE_2 if schema == 2 else ''} COMMIT;")
        for name, family, size in ((A, "loca", 11), (B, "loca", 22), (C, "pica", 33)):
            db.execute(
                "INSERT INTO versions (digest, family, size_bytes, resident_bytes, module_count, parameter_count, "
                "base_model_name_or_path, warnings) VALUES (?, ?, ?, ?, 4, 40, 'base', ?)",
                (name, family, size, size * 10, json.dumps(["careful"] if name == C else [])),
            )
        rows = [
            ("x", UID, C, 0, json.dumps({"team": "bl\u00fce", "b": ""}), 2_000_000, 3_000_000, 3),
            ("y", UID[::-1], A, 1, "{}", 1_000_000, 1_000_000, 1),
        ]
        db.executemany("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        history = [("x", A, 5), ("x", B, 2), ("x", C, 6), ("y", A, 1)]
        db.executemany("INSERT INTO adapter_versions VALUES (?, ?, ?)", history)
        if schema == 2:
            db.execute("UPDATE versions SET basis = 'svd' WHERE digest = ?", (C,))
            shared = [(C, digest("matrix")), (B, digest("matrix")), (B, digest("pattern"))]
            db.executemany("INSERT INTO shared_blobs VALUES (?, ?)", shared)
        db.execute(f"PRAGMA user_version={schema}")


@pytest.mark.parametrize("schema", [1, 2])
def test_everything_is_still_there(tmp_path: Path, schema: int) -> None:
    make_old(tmp_path / "old", schema)
    steps: list[tuple[int, int]] = []
    catalogue = Catalogue(tmp_path / "old", lambda done, total: steps.append((done, total)))
    assert steps[0][0] == 0
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert steps[-1][0] == steps[-1][1]
    assert catalogue.check() == []
    x, y = catalogue.page(Listing(9)).records
    assert (x.id, x.uid, x.etag, x.digest, x.versions) == ("x", UID, f"{UID}-3", C, (C, A, B))
    assert (x.family, x.size_bytes, x.warnings, x.basis) == ("pica", 33, ("careful",), "svd" if schema == 2 else "")
    assert (x.labels, x.tenant, x.state, x.last_used_time) == ({"team": "blüe", "b": ""}, "", "ready", None)
    assert (x.create_time.timestamp(), x.update_time.timestamp()) == (2, 3)
    assert (x.module_count, x.parameter_count, x.base_model_name_or_path, x.base_fingerprint) == (4, 40, "base", "")
    assert (y.id, y.uid, y.versions, y.pinned, y.labels) == ("y", UID[::-1], (A,), True, {})
    assert catalogue.pinned() == {A: 110}
    assert catalogue.place_of(B) == Place(OWN_FILE, 0, 22)
    assert [record.id for record in catalogue.page(Listing(9, 'labels.team = "blüe"')).records] == ["x"]
    shared = 2 if schema == 2 else 0
    assert catalogue.counts() == Counts(2, 3, 3 + shared, 66)
    assert len(catalogue.own_files("", 9)) == 3 + shared
    assert catalogue.packs() == []
    catalogue.close()


def test_it_goes_on_from_there(tmp_path: Path) -> None:
    make_old(tmp_path / "old", 2)
    catalogue = Catalogue(tmp_path / "old")
    assert catalogue.place_of(digest("matrix")) == Place(OWN_FILE, 0, 0)
    assert catalogue.activate("x").digest == A
    one = replace(version("new", "matrix"), digest=digest("new"))
    put = catalogue.put(entry("z", one), {one.digest: Packer().place(), digest("matrix"): Place(OWN_FILE, 0, 8)})
    assert datetime.now(UTC) >= put.create_time > catalogue.get("x").create_time
    assert {name for name, _ in catalogue.release(catalogue.delete("x").versions)} == {B, C, digest("pattern")}
    assert {name for name, _ in catalogue.release(catalogue.delete("z").versions)} == {one.digest, digest("matrix")}
    assert catalogue.get("y").digest == A
    assert catalogue.check() == []
    catalogue.close()


def test_a_migration_happens_or_does_not(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    make_old(tmp_path / "old", 2)
    steps: list[int] = []
    catalogue = Catalogue(tmp_path / "old", lambda done, total: steps.append(done))
    expected = catalogue.page(Listing(9)).records
    catalogue.close()
    for stop in steps[:-1:4]:
        path = tmp_path / f"stopped-{stop}"
        make_old(path, 2)

        def stop_here(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise Stopped

        with pytest.raises(Stopped):
            Catalogue(path, stop_here)
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            assert db.execute("SELECT count(*) FROM shared_blobs").fetchone() == (3,)
        reopened = Catalogue(path)
        assert reopened.page(Listing(9)).records == expected
        reopened.close()


def test_a_newer_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    Catalogue(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(ConfigError, match="written by a newer one"):
        Catalogue(path)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreFailed):
        Catalogue(path)
