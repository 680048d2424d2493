"""Copies of a store: whole, durable, and independent of the original."""

from __future__ import annotations

import io
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from overtone.adapters import AdapterStore
from overtone.adapters.maintenance import Maintenance
from overtone.errors import ConfigError, StoreFailed
from support.adapters import open_store, put
from support.packs import Disk, small_own_files

Make = Callable[[int], Path]


def remote_of(tmp_path: Path) -> str:
    return f"file://{tmp_path}/objects"


def objects(tmp_path: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (tmp_path / "objects").rglob("*") if path.is_file()}


def evicted_store(tmp_path: Path, loca: Make, count: int = 6) -> AdapterStore:
    """Most of it is in object storage only."""
    store = open_store(tmp_path / "store", remote_url=remote_of(tmp_path), pack_bytes=1 << 12, disk_bytes=1)
    for seed in range(count):
        put(store, loca(seed), f"a{seed}")
    store._blobs.upload()
    return store


def test_a_backup_needs_no_object_storage_and_leaves_the_original_alone(tmp_path: Path, loca: Make) -> None:
    with small_own_files(1000):
        store = evicted_store(tmp_path, loca)
        assert store._blobs.stats().evicted_packs > 0
        versions = {record.id: record.digest for record in store.list(100)[0]}
        store.backup(tmp_path / "copy")
        before = objects(tmp_path)
        alone = open_store(tmp_path / "copy")
        assert not alone.check(deep=True)
        alone.close()
        # The same object storage: the copy has a name of its own there.
        with closing(open_store(tmp_path / "copy", remote_url=remote_of(tmp_path), pack_bytes=1 << 12)) as copy:
            copy._blobs.upload()
            for seed in range(5):
                copy.delete(f"a{seed}")
            copy.compact(below=1.0)
            put(copy, loca(9), "other")
            copy._blobs.upload()
        assert {path: objects(tmp_path).get(path) for path in before} == before
        assert {adapter_id: store.get(adapter_id).digest for adapter_id in versions} == versions
        assert not store.check(deep=True)
        store.close()


def test_a_backup_without_the_object_storage_that_it_needs_is_refused(tmp_path: Path, loca: Make) -> None:
    evicted_store(tmp_path, loca).close()
    with Maintenance(tmp_path / "store") as offline, pytest.raises(StoreFailed, match="none is configured"):
        offline.backup(tmp_path / "copy")
    with pytest.raises(ConfigError):
        open_store(tmp_path / "copy")
    with Maintenance(tmp_path / "store", remote_of(tmp_path)) as offline:
        offline.backup(tmp_path / "second")
    with closing(open_store(tmp_path / "second")) as copy:
        assert not copy.check(deep=True)


def test_half_a_backup_is_no_store(tmp_path: Path, store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    with Disk() as faults:
        faults.refuse("write_all")
        with pytest.raises(StoreFailed):
            store.backup(tmp_path / "half")
    with pytest.raises(ConfigError, match="no adapter store"):
        Maintenance(tmp_path / "half")
    with pytest.raises(ConfigError, match="catalogue"):
        open_store(tmp_path / "half")
    with pytest.raises(ConfigError, match="not empty"):
        store.backup(tmp_path / "half")
    store.backup(tmp_path / "whole")
    with closing(open_store(tmp_path / "whole")) as copy:
        assert copy.get("a") == store.get("a")


def test_leases_end_while_the_store_is_copied(
    tmp_path: Path, store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, loca(1), "a")
    put(store, loca(2), "b")
    lease = store.acquire("a")
    store.delete("a")
    copying, released = threading.Event(), threading.Event()
    real = store._blobs.copy

    def copy(*arguments: object) -> None:
        copying.set()
        assert released.wait(20)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store._blobs, "copy", copy)
    worker = threading.Thread(target=store.backup, args=(tmp_path / "copy",))
    worker.start()
    assert copying.wait(20)
    lease.release()
    released.set()
    worker.join()
    store._versions.catch_up()
    assert not store._versions._doomed
    assert [record.id for record in store.list(10)[0]] == ["b"]
    assert store.stats().version_count == 1


@pytest.mark.parametrize("how", ["empty", "without its log"])
def test_a_store_with_an_empty_catalogue_is_not_wiped(tmp_path: Path, loca: Make, how: str) -> None:
    with closing(open_store(tmp_path)) as store:
        put(store, loca(1), "a")
    folder = tmp_path / "adapters"
    kept = {path.name: path.read_bytes() for path in (folder / "packs").iterdir()}
    for file in folder.glob("catalogue.sqlite3*"):
        file.rename(tmp_path / file.name)
    (folder / "catalogue.sqlite3").touch()
    if how == "without its log":
        with closing(sqlite3.connect(folder / "catalogue.sqlite3")) as db:
            db.execute("PRAGMA journal_mode=WAL")
    for _ in range(2):
        with pytest.raises(ConfigError, match="missing or empty"):
            open_store(tmp_path)
    assert {path.name: path.read_bytes() for path in (folder / "packs").iterdir()} == kept


def test_any_tenants_adapters_are_exported_and_nothing_is_loaded(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path / "store")) as store:
        put(store, loca(1), "a", tenant="somebody")
        put(store, loca(2), "b")
    with closing(open_store(tmp_path / "store")) as store:
        file = io.BytesIO()
        store.export(["a", "b"], file)
        assert (store.stats().load_count, store.stats().leased_count, store.stats().resident_count) == (0, 0, 0)
        assert file.getvalue().count(b"overtone_adapter.json") == 2
        store.delete("a")
        assert store.stats().version_count == 1


def test_what_is_exported_stays_until_it_is_written(
    tmp_path: Path, store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, loca(1), "a")
    real = store._blobs.read

    def read(digest: str) -> bytes:
        if store._catalogue.exists("a"):
            store.delete("a")
        return real(digest)

    monkeypatch.setattr(store._blobs, "read", read)
    file = io.BytesIO()
    store.export(["a"], file)
    assert b"overtone_adapter.json" in file.getvalue()
    assert store.stats().version_count == 0


def test_loads_are_counted_by_where_they_came_from(tmp_path: Path, loca: Make) -> None:
    evicted_store(tmp_path, loca).close()
    with closing(open_store(tmp_path / "store", remote_url=remote_of(tmp_path), pack_bytes=1 << 12)) as store:
        for _ in range(2):
            store.acquire("a0").release()
        assert (store.stats().remote_load_count, store.stats().disk_load_count) == (1, 0)
