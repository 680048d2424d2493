"""The watched folder, look by look."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters.files import AdapterFiles
from overtone.adapters.operations import ImportItem
from overtone.api import dropped
from overtone.api.change_log import ChangeLog
from overtone.api.drop_folder import DropFolder, watch_folder
from overtone.errors import StoreFailed
from support.adapters import make_loca_folder
from support.archives import CONFIG, WEIGHTS
from support.fake_store import FakeStore
from support.server import ThreadServer
from support.tiny import tiny_base


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


@pytest.fixture
def make(store: FakeStore, folder: Path) -> Callable[..., DropFolder]:
    def made(*, delete: bool = False, max_bytes: int = 1 << 20) -> DropFolder:
        memory = folder.with_name("watched.json")
        return DropFolder(folder, store, max_bytes, ChangeLog(), delete=delete, memory=memory)  # type: ignore[arg-type]

    return made


def write(folder: Path, name: str, weights: bytes = b"1", *files: str) -> None:
    (folder / name).mkdir(exist_ok=True)
    for file, data in ((CONFIG, b"{}"), (WEIGHTS, weights), *((each, b"") for each in files)):
        (folder / name / file).write_bytes(data)


def test_a_folder_is_loaded_once_it_is_still(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make()
    write(folder, "a")
    drop.look()
    assert not store.records
    with (folder / "a" / WEIGHTS).open("ab") as file:
        file.write(b"23")
    drop.look()
    assert not store.records  # it is still being written
    drop.look()
    assert store.get("a").size_bytes == 3
    drop.look()
    assert store.batches == [["a"]]


def test_a_ready_file_says_that_it_is_complete(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make()
    write(folder, "a", b"1", ".ready")
    drop.look()
    assert store.records.keys() == {"a"}


def test_a_new_content_becomes_a_new_version(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make()
    write(folder, "a", b"1", ".ready")
    drop.look()
    write(folder, "a", b"22")
    os.utime(folder / "a" / WEIGHTS, ns=(1, 1))
    drop.look()
    assert store.get("a").size_bytes == 2
    assert len(store.get("a").versions) == 2


def test_what_is_refused_is_told_beside_it(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make()
    write(folder, "bad", b"bad", ".ready")
    write(folder, "no id", b"1", ".ready")
    write(folder, "half", b"1", ".ready")
    (folder / "half" / WEIGHTS).unlink()
    write(folder, "good", b"1", ".ready")
    drop.look()
    assert store.records.keys() == {"good"}
    errors = {path.name: path.read_text() for path in folder.glob("*.error")}
    assert errors.keys() == {"bad.error", "no id.error", "half.error"}
    assert errors["bad.error"] == "ADAPTER_MALFORMED: spectrum: spectrum has 3 numbers, not 4\n"
    assert WEIGHTS in errors["half.error"]
    drop.look()
    assert len(store.batches) == 1  # not again until it changes
    write(folder, "bad", b"fine")
    drop.look()
    assert "bad" in store.records
    assert not (folder / "bad.error").exists()


def test_links_and_hidden_folders_are_left_alone(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], tmp_path: Path
) -> None:
    write(tmp_path, "elsewhere", b"1", ".ready")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    write(folder, ".hidden", b"1", ".ready")
    write(folder, "file-link", b"1", ".ready")
    (folder / "file-link" / WEIGHTS).unlink()
    (folder / "file-link" / WEIGHTS).symlink_to(tmp_path / "elsewhere" / WEIGHTS)
    (folder / "empty").mkdir()
    drop = make()
    drop.look()
    drop.look()
    assert not store.records
    assert [path.name for path in folder.glob("*.error")] == ["file-link.error"]


def test_removed_folders(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    for delete in (False, True):
        drop = make(delete=delete)
        for name in ("gone", "bad", "stays"):
            write(folder, name, b"bad" if name == "bad" else b"1", ".ready")
        drop.look()
        for name in ("gone", "bad"):
            shutil.rmtree(folder / name)
        drop.look()
        assert "gone" in store.records  # it may only be on its way to another form
        drop.look()
        assert ("gone" in store.records) is not delete
        assert not list(folder.glob("*.error"))


def test_what_somebody_else_changed_is_not_deleted(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder]
) -> None:
    drop = make(delete=True)
    write(folder, "a", b"1", ".ready")
    drop.look()
    store.import_many([ImportItem("a", AdapterFiles(b"{}", b"2"))])
    shutil.rmtree(folder / "a")
    drop.look()
    drop.look()
    assert "a" in store.records


def test_a_folder_that_cannot_be_listed_deletes_nothing(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder]
) -> None:
    drop = make(delete=True)
    write(folder, "a", b"1", ".ready")
    drop.look()
    folder.rename(folder.with_name("unmounted"))
    for _ in range(3):
        with pytest.raises(StoreFailed):
            drop.look()
    assert "a" in store.records


def test_another_folder_in_its_place_deletes_nothing(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder]
) -> None:
    """As the mount point is, once nothing is mounted on it."""
    drop = make(delete=True)
    write(folder, "a", b"1", ".ready")
    drop.look()
    folder.rename(folder.with_name("unmounted"))
    folder.mkdir()
    for _ in range(3):
        with pytest.raises(StoreFailed, match="another one"):
            drop.look()
    folder.rmdir()
    folder.with_name("unmounted").rename(folder)
    drop.look()
    assert (store.records.keys(), len(store.batches)) == ({"a"}, 1)


def test_nothing_is_deleted_when_everything_vanishes(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder]
) -> None:
    drop = make(delete=True)
    for name in "abc":
        write(folder, name, b"1", ".ready")
    drop.look()
    for name in "abc":
        (folder / name).rename(folder.with_name(name))
    for _ in range(3):
        with pytest.raises(StoreFailed, match="vanished at once"):
            drop.look()
    assert store.records.keys() == set("abc")
    for name in "ab":
        folder.with_name(name).rename(folder / name)
    for _ in range(3):
        drop.look()
    assert (store.records.keys(), len(store.batches)) == (set("ab"), 1)


def test_two_misses_count_only_in_a_row(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make(delete=True)
    for name in ("a", "other"):
        write(folder, name, b"1", ".ready")
    drop.look()
    for _ in range(3):
        (folder / "a").rename(folder.with_name("a"))
        drop.look()
        folder.with_name("a").rename(folder / "a")
        drop.look()
    assert "a" in store.records


def test_a_batch_fits_in_memory(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "_BATCH_BYTES", 1000)
    for i in range(10):
        write(folder, f"a{i}", b"1" * 300, ".ready")
    write(folder, "large", b"1" * 5000, ".ready")
    make().look()
    assert len(store.records) == 11
    sizes = [[store.get(name).size_bytes for name in batch] for batch in store.batches]
    assert all(sum(batch) <= 1000 or len(batch) == 1 for batch in sizes)
    assert len(sizes) <= 6


def test_a_restart_undoes_nothing(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    for name in ("deleted", "replaced", "gone", "same"):
        write(folder, name, b"1", ".ready")
    make(delete=True).look()
    store.delete("deleted")
    store.import_many([ImportItem("replaced", AdapterFiles(b"{}", b"2"))])
    shutil.rmtree(folder / "gone")
    write(folder, "new", b"1", ".ready")
    again = make(delete=True)
    for _ in range(3):
        again.look()
    assert store.records.keys() == {"replaced", "gone", "same", "new"}  # what was removed meanwhile stays
    assert store.get("replaced").versions[0] == store.get("replaced").digest != store.get("same").digest
    shutil.rmtree(folder / "same")
    for _ in range(2):
        again.look()
    assert "same" not in store.records


def test_an_empty_folder_at_the_start_forgets_nothing(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder]
) -> None:
    write(folder, "a", b"1", ".ready")
    make(delete=True).look()
    (folder / "a").rename(folder.with_name("a"))
    again = make(delete=True)
    for _ in range(3):
        with pytest.raises(StoreFailed, match="is empty"):
            again.look()
    store.delete("a")
    folder.with_name("a").rename(folder / "a")
    again.look()
    assert not store.records


@pytest.mark.parametrize("content", [b"", b"[]", b'{"folder": 1}', b"\xff", b'{"folder": "FOLDER", "known": {"a": 1}}'])
def test_a_memory_that_cannot_be_read_is_none(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], content: bytes
) -> None:
    folder.with_name("watched.json").write_bytes(content.replace(b"FOLDER", str(folder).encode()))
    write(folder, "a", b"1", ".ready")
    make().look()
    assert store.records.keys() == {"a"}


def test_what_cannot_be_read_now_is_tried_again(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, real = make(), os.open
    for name in "ab":
        write(folder, name, b"1", ".ready")

    def failing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith("/a"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr("overtone.adapters.folder.os.open", failing)
        with pytest.raises(StoreFailed, match="Too many open files"):
            drop.look()
    assert (store.records.keys(), list(folder.glob("*.error"))) == ({"b"}, [])
    drop.look()
    assert store.records.keys() == {"a", "b"}


def test_a_deletion_that_fails_is_tried_again(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = make(delete=True)
    for name in "ab":
        write(folder, name, b"1", ".ready")
    drop.look()
    shutil.rmtree(folder / "a")
    drop.look()

    def full(*arguments: Any, **more: Any) -> None:
        raise StoreFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", full)
        with pytest.raises(StoreFailed, match="full"):
            drop.look()
    drop.look()
    assert store.records.keys() == {"b"}


def test_a_refusal_is_not_written_through_a_link(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (folder / "bad.error").symlink_to(precious)
    (folder / ".bad.error").symlink_to(precious)
    write(folder, "bad", b"bad", ".ready")
    make().look()
    assert precious.read_text() == "mine"
    assert "ADAPTER_MALFORMED" in (folder / "bad.error").read_text()


def test_a_look_that_is_stopped_loads_no_more(
    store: FakeStore, folder: Path, make: Callable[..., DropFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, real = make(), store.import_many
    monkeypatch.setattr(dropped, "_BATCH", 2)
    for i in range(10):
        write(folder, f"a{i}", b"1", ".ready")

    def stopping(items: list[ImportItem]) -> Any:
        drop.stop()
        return real(items)

    monkeypatch.setattr(store, "import_many", stopping)
    drop.look()
    assert len(store.records) == 2


def test_a_full_disk_is_tried_again(store: FakeStore, folder: Path, make: Callable[..., DropFolder]) -> None:
    drop = make()
    write(folder, "a", b"broken", ".ready")
    for _ in range(2):
        with pytest.raises(StoreFailed):
            drop.look()
    assert len(store.batches) == 2
    assert not (folder / "a.error").exists()


def test_problems_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    looks = []

    class Broken:
        def look(self) -> None:
            looks.append(1)
            if len(looks) == 10:
                raise asyncio.CancelledError
            raise StoreFailed("the disk is full" if len(looks) < 5 else "the disk is gone")

    class Threads:
        async def in_import(self, work: Callable[[], None]) -> None:
            work()

    async def some_looks() -> None:
        await watch_folder(Broken(), Threads(), 0.0)  # type: ignore[arg-type]

    with caplog.at_level(logging.WARNING), suppress(asyncio.CancelledError):
        asyncio.run(some_looks())
    assert [record.getMessage() for record in caplog.records] == [
        "the watched folder: the disk is full",
        "the watched folder: the disk is gone",
    ]


def test_a_server_loads_what_is_dropped(tmp_path: Path) -> None:
    base = tiny_base()
    drop = tmp_path / "drop"
    drop.mkdir()
    make_loca_folder(drop / "before", base.modules, n=10, seed=1)
    with ThreadServer(tmp_path / "store", base, watch_folder=drop) as server, server.client() as client:
        with closing(client.adapters.watch(snapshot=True)) as updates:
            make_loca_folder(drop / "later", base.modules, n=10, seed=2)
            names: set[str] = set()
            for update in updates:
                names |= {event.id for event in update.events}
                if names == {"before", "later"}:
                    break
        assert client.generate("abc", adapter="later", max_new_tokens=2).token_ids
