"""A kill at any step: what was acknowledged is there and exact, nothing else is, and the files hold nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters.packs import OWN_FILE, disk
from overtone.adapters.packs.place import record_bytes
from support.packs import Disk, Killed, Store, blobs_of, small_own_files

Do = Callable[[Store], None]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_own_files(1000):
        yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, pack_bytes=1000)
    yield opened
    opened.close()


def mixed(seed: int) -> dict[str, bytes]:
    return blobs_of(*[100] * 8, 1500, *[90] * 7, 2000, seed=seed)


OPERATIONS: dict[str, Do] = {
    "store": lambda store: store.put(mixed(2)),
    "store again": lambda store: store.put(mixed(1)),
    "release": lambda store: store.release(list(mixed(1))[::2]),
    "release and compact": lambda store: (store.release(list(mixed(1))[::2]), store.blobs.compact(0.9))[0],
    "heal": lambda store: ([store.damage(digest) for digest in list(mixed(1))[::8]], store.put(mixed(1)))[1],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_every_step(tmp_path: Path, name: str) -> None:
    contents, step, killed = mixed(1) | mixed(2), 0, True
    while killed:
        store = Store(tmp_path / str(step), pack_bytes=1000)
        store.put(mixed(1))
        killed = killed_at(step, store, OPERATIONS[name])
        store.reopen()
        known = {digest: contents[digest] for digest in store.index.places}
        if name != "heal":
            assert known.keys() >= (mixed(1).keys() if name.startswith("store") else set(list(mixed(1))[1::2]))
            store.assert_whole(known)
        assert store.own_files() == {digest for digest, place in store.index.places.items() if place.pack == OWN_FILE}
        assert not list(store.folder.tmp.iterdir())
        ends = {store.folder.pack(facts.number).name: facts.end for facts in store.index.packs()}
        assert {path.name: disk.size(path) for path in store.folder.packs.iterdir()} == ends
        OPERATIONS[name](store)
        store.put(mixed(2))
        store.assert_whole({digest: contents[digest] for digest in store.index.places})
        store.close()
        step += 1
    assert step > (0 if name == "store again" else 3)


def killed_at(step: int, store: Store, operation: Do) -> bool:
    with Disk() as faults:
        faults.kill(step, store.index)
        try:
            operation(store)
        except Killed:
            return True
        return faults.dead


def test_a_kill_in_the_middle_of_a_recovery(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=1000)
    store.put(mixed(1))
    assert killed_at(7, store, OPERATIONS["store"])
    store.close()
    step, killed = 0, True
    while killed:
        killed = killed_at(step, store, lambda store: (store.open(), None)[1])
        store.blobs.close()
        store.folder.close()
        step += 1
    assert step > 4
    store.open()
    store.assert_whole(mixed(1))
    store.close()


def test_whatever_is_behind_the_end_is_cut_off(store: Store) -> None:
    blobs = store.put_all(100, 101)
    end = disk.size(store.folder.pack(1))
    for tail in (b"x", b"\0" * 1000, b"OVTBLOB1" + bytes(100)):
        store.close()
        with store.folder.pack(1).open("ab") as file:
            file.write(tail)
        store.folder.pack(7).write_bytes(tail)
        (store.folder.tmp / "left").mkdir()
        (store.folder.tmp / "left" / "over").write_text("x")
        (store.folder.tmp / "link").symlink_to(store.folder.packs)
        store.open()
        assert disk.size(store.folder.pack(1)) == end
        assert store.pack_files() == ["00000001.pack"]
        assert not list(store.folder.tmp.iterdir())
        store.assert_whole(blobs)
    store.put_all(50, seed=1)
    assert disk.size(store.folder.pack(1)) == end + record_bytes(50)


def test_a_hole_that_was_never_committed(store: Store) -> None:
    """The second of two batches is committed, the first is not."""
    first, second = blobs_of(100, seed=1), blobs_of(100, seed=2)
    with store.blobs.store(first), store.blobs.store(second) as places:
        store.index.commit(places)
    store.reopen()
    assert store.index.places.keys() == second.keys()
    assert store.index.places[next(iter(second))].offset == record_bytes(100)
    store.put(first)
    store.assert_whole(first | second)


def test_an_intent_that_says_anything(store: Store) -> None:
    blobs = store.put_all(1500)
    store.folder.write_intent(["../../catalogue", "", *blobs, "f" * 64])
    (store.folder.tmp / "torn.intent").write_bytes(b"\xff\x00" + next(iter(blobs)).encode()[:30])
    store.reopen()
    store.assert_whole(blobs)


def test_a_start_looks_at_packs_only(store: Store) -> None:
    """And not at blobs: neither on the disk nor in the index."""
    blobs = store.put_all(*[100] * 50, *[1500] * 20)
    asked: list[str] = []
    with Disk() as faults, pytest.MonkeyPatch.context() as patch:
        for name in ("place_of", "live_in", "own_files"):
            patch.setattr(store.index, name, lambda *args, name=name: asked.append(name))
        faults.wrap(["read_file", "pread", "open_read"], lambda name, real, args: asked.append(name))
        store.reopen()
    assert asked == []
    store.assert_whole(blobs)


def test_nothing_is_acknowledged_before_it_is_synced(store: Store) -> None:
    """Neither contents nor names: a power cut forgets what was not synced."""
    unsynced: set[object] = set()
    commits = 0

    def around(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = real(*args)
        if name in ("create", "replace"):
            unsynced.add(args[-1])
        elif name == "write_all":
            unsynced.add(args[0])
        elif name == "sync":
            unsynced.discard(args[0])
        elif name == "sync_folder":
            unsynced.difference_update([path for path in unsynced if isinstance(path, Path) and path.parent == args[0]])
        elif name == "unlink":
            unsynced.discard(args[0])
        return result

    def before_commit() -> None:
        nonlocal commits
        commits += 1
        assert not [left for left in unsynced if not isinstance(left, Path) or left.parent != store.folder.tmp]

    with Disk() as faults, pytest.MonkeyPatch.context() as patch:
        faults.wrap(["create", "replace", "write_all", "sync", "sync_folder", "unlink"], around)
        patch.setattr(store.index, "before_commit", before_commit)
        for operation in OPERATIONS.values():
            operation(store)
            store.put(mixed(1))
    assert commits > 10
