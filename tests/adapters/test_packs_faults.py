"""A disk that refuses: a typed error, nothing lost that was acknowledged, and later writes work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from overtone.adapters.packs import OWN_FILE_BYTES, disk
from overtone.adapters.packs.place import record_bytes
from overtone.errors import StoreCorrupted, StoreFailed
from support.packs import STEPS, Disk, Store, blobs_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, pack_bytes=1000)
    yield opened
    opened.close()


def refused(store: Store, blobs: dict[str, bytes]) -> None:
    with pytest.raises(StoreFailed, match="No space left on device") as caught:
        store.put(blobs)
    assert "secret" not in str(caught.value)
    assert not blobs.keys() & store.index.places.keys()


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("call", ["create", "write_all", "sync", "sync_folder"])
def test_a_batch_over_several_packs(store: Store, call: str, after: int) -> None:
    kept = store.put_all(*[100] * 4)
    lost = blobs_of(*[100] * 30, seed=1)
    with Disk() as faults:
        faults.refuse(call, after=after)
        refused(store, lost)
    store.assert_sound(kept)
    store.put(lost)
    store.assert_sound(kept | lost)
    store.reopen()
    store.assert_whole(kept | lost)


def test_a_full_disk_gives_its_bytes_back(store: Store) -> None:
    kept = store.put_all(100)
    for attempt in range(3):
        with Disk() as faults:
            faults.refuse("write_all")
            refused(store, blobs_of(300, 301, seed=attempt))
        assert disk.size(store.folder.pack(1)) == record_bytes(100)
    assert store.pack_files() == ["00000001.pack"]
    more = store.put_all(200, seed=9)
    assert {place.pack for place in store.index.places.values()} == {1}
    store.assert_whole(kept | more)


def test_a_pack_that_cannot_be_cut_is_left(store: Store) -> None:
    kept = store.put_all(100)
    with Disk() as faults:
        faults.refuse("write_all")
        faults.refuse("truncate")
        refused(store, blobs_of(300, seed=1))
    assert disk.size(store.folder.pack(1)) > record_bytes(100)
    more = store.put_all(40, seed=2)
    assert store.index.places[next(iter(more))].pack == 2
    store.assert_whole(kept | more)
    store.reopen()
    assert disk.size(store.folder.pack(1)) == record_bytes(100)
    store.assert_whole(kept | more)


def test_a_first_pack_that_fails_leaves_nothing(store: Store) -> None:
    for call in ("write_all", "sync"):
        with Disk() as faults:
            faults.refuse(call)
            refused(store, blobs_of(100, seed=1))
        store.blobs._parts.writer.seal()
        assert store.pack_files() == []


def test_all_who_wait_for_a_failing_sync_fail(store: Store) -> None:
    """The kernel says once that it dropped what it could not write; who asks next hears that all is well."""
    kept = store.put_all(100)
    written, outcomes = threading.Semaphore(0), []

    def put(seed: int) -> None:
        try:
            store.put(blobs_of(50, seed=seed))
            outcomes.append("stored")
        except StoreFailed:
            outcomes.append("refused")

    busy = store.blobs._parts.writer._open[1].syncing
    with Disk() as faults:
        faults.wrap(["write_all"], lambda _, real, args: (real(*args), written.release()))
        faults.refuse("sync", times=1, errno=5)
        with busy:
            workers = [threading.Thread(target=put, args=(seed,)) for seed in range(1, 4)]
            for worker in workers:
                worker.start()
            for _ in workers:
                written.acquire()
        for worker in workers:
            worker.join()
    assert outcomes == ["refused"] * 3
    more = store.put_all(60, seed=9)
    assert store.index.places[next(iter(more))].pack == 2
    assert disk.size(store.folder.pack(1)) == record_bytes(100)
    store.assert_whole(kept | more)


@pytest.mark.parametrize("call", ["create", "write_all", "sync", "sync_folder", "replace"])
@pytest.mark.parametrize("after", [0, 1])
def test_files_of_their_own(store: Store, call: str, after: int) -> None:
    if (call, after) == ("replace", 1):
        return
    kept, lost = store.put_all(100, OWN_FILE_BYTES), blobs_of(OWN_FILE_BYTES + 1, seed=1)
    before = store.own_files()
    with Disk() as faults:
        faults.refuse(call, after=after)
        refused(store, lost)
    assert store.own_files() == before
    assert not [path for path in store.folder.tmp.iterdir() if path.suffix != ".intent"]
    store.put(lost)
    store.assert_whole(kept | lost)
    store.reopen()
    store.assert_whole(kept | lost)
    assert not list(store.folder.tmp.iterdir())


def test_files_that_cannot_be_removed_go_at_the_next_start(store: Store) -> None:
    blobs = store.put_all(OWN_FILE_BYTES)
    with Disk() as faults:
        faults.refuse("unlink")
        store.release(blobs)
    assert store.own_files() == blobs.keys()
    store.reopen()
    assert not store.own_files()
    store.assert_whole({})


def test_an_index_that_refuses_keeps_the_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = store.put_all(OWN_FILE_BYTES, 100)

    def refuse() -> None:
        raise StoreFailed("no")

    with monkeypatch.context() as patch:
        patch.setattr(store.index, "before_commit", refuse)
        with pytest.raises(StoreFailed):
            store.release(blobs)
        with pytest.raises(StoreFailed):
            store.put_all(200, OWN_FILE_BYTES + 1, seed=1)
    assert not list(store.folder.tmp.iterdir())
    store.assert_whole(blobs)
    with Disk() as faults:
        faults.refuse("create")
        with pytest.raises(StoreFailed):
            store.release(blobs)
    store.assert_whole(blobs)


def test_a_quarantine_that_refuses_hides_nothing(store: Store) -> None:
    blobs = store.put_all(100)
    store.damage(next(iter(blobs)))
    with Disk() as faults:
        faults.refuse("create")
        with pytest.raises(StoreCorrupted):
            store.blobs.read(next(iter(blobs)))
    assert not store.set_aside()


@pytest.mark.parametrize("call", ["pread", "open_read", "read_file"])
def test_a_read_that_fails_is_no_corruption(store: Store, call: str) -> None:
    blobs = store.put_all(100, OWN_FILE_BYTES)
    store.blobs._parts.handles.close()
    with Disk() as faults:
        faults.refuse(call, errno=5)
        with pytest.raises(StoreFailed):
            [store.blobs.read(digest) for digest in blobs]
    assert not store.set_aside()
    store.assert_whole(blobs)


@pytest.mark.parametrize("call", ["write_all", "sync", "unlink"])
def test_a_compaction_that_fails(store: Store, call: str) -> None:
    blobs = store.put_all(*[100] * 40)
    kept = dict(list(blobs.items())[::3])
    store.release(blobs.keys() - kept.keys())
    with Disk() as faults:
        faults.refuse(call)
        with pytest.raises(StoreFailed):
            store.blobs.compact()
    store.assert_sound(kept)
    store.blobs.compact()
    store.assert_sound(kept)
    store.reopen()
    store.assert_whole(kept)


@pytest.mark.parametrize("call", STEPS)
def test_a_start_that_fails_is_tried_again(store: Store, call: str) -> None:
    kept = store.put_all(100, OWN_FILE_BYTES)
    with store.blobs.store(blobs_of(300, seed=1)):
        pass
    store.folder.write_intent(["0" * 64])
    store.close()
    with Disk() as faults:
        faults.refuse(call)
        try:
            store.open()
        except StoreFailed:
            store.folder.close()
            store.blobs.close()
        else:
            store.close()
    store.open()
    store.assert_whole(kept)
