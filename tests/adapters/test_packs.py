"""Blobs in packs and in files of their own: stored, read, released."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overtone.adapters.packs import OWN_FILE, OWN_FILE_BYTES, Blobs, Place, StoreFolder, digest_of, disk
from overtone.adapters.packs.handles import Handles
from overtone.adapters.packs.place import record_bytes
from overtone.errors import ConfigError, StoreCorrupted
from support.packs import Disk, Store, blobs_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, pack_bytes=1 << 20)
    yield opened
    opened.close()


def test_a_record_is_header_blob_and_padding(store: Store) -> None:
    blobs = store.put_all(0, 1, 7, 8, 9)
    (name,) = store.pack_files()
    content, at = (store.folder.packs / name).read_bytes(), 0
    for digest, blob in blobs.items():
        place = store.index.places[digest]
        assert place == Place(1, at, len(blob))
        assert content[at : at + 8] == b"OVTBLOB1"
        assert int.from_bytes(content[at + 8 : at + 16], "little") == len(blob)
        assert content[at + 16 : at + 48].hex() == digest
        assert content[place.data : place.data + len(blob)] == blob
        assert not any(content[place.data + len(blob) : place.end])
        at = place.end
    assert at == len(content)
    store.assert_whole(blobs)


def test_packs_are_full_before_the_next_begins(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=10 * record_bytes(100))
    blobs = store.put_all(*[100] * 25) | store.put_all(*[5000] * 2, seed=1) | store.put_all(8, seed=2)
    ends = {facts.number: facts.end for facts in store.index.packs()}
    # A blob that is longer than a pack has one to itself, and so the next is full.
    assert [ends[number] // record_bytes(100) for number in (1, 2, 3)] == [10, 10, 5]
    assert [ends[number] for number in (4, 5, 6)] == [record_bytes(5000)] * 2 + [record_bytes(8)]
    store.assert_whole(blobs)
    store.reopen()
    more = store.put_all(8, seed=3)
    assert store.index.places[next(iter(more))].pack == 6
    store.assert_whole(blobs | more)
    store.close()


def test_large_blobs_are_files_of_their_own(store: Store) -> None:
    blobs = store.put_all(OWN_FILE_BYTES, OWN_FILE_BYTES - 1)
    large, small = blobs
    assert store.index.places[large] == Place(OWN_FILE, 0, OWN_FILE_BYTES)
    assert store.index.places[small].pack == 1
    path = store.folder.root / "blobs" / "sha256" / large[:2] / f"{large}.safetensors"
    assert path.read_bytes() == blobs[large]
    assert not list(store.folder.tmp.iterdir())
    store.assert_whole(blobs)
    store.release([large])
    assert not path.exists()
    with pytest.raises(StoreCorrupted, match="missing"):
        store.blobs.read(large)


def test_a_store_of_nothing_but_files(tmp_path: Path) -> None:
    """As it was before there were packs."""
    store = Store(tmp_path)
    blobs = blobs_of(*range(10, 20))
    for digest, blob in blobs.items():
        path = tmp_path / "adapters" / "blobs" / "sha256" / digest[:2] / f"{digest}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
    store.index.commit({digest: Place(OWN_FILE, 0, len(blob)) for digest, blob in blobs.items()})
    store.reopen()
    store.assert_whole(blobs)
    assert not store.pack_files()
    more = store.put_all(5, seed=1)
    assert store.pack_files() == ["00000001.pack"]
    store.assert_whole(blobs | more)
    store.release(list(blobs)[:4])
    assert store.own_files() == set(list(blobs)[4:])
    store.close()


def test_what_the_index_has_is_not_written_again(store: Store) -> None:
    blobs = store.put_all(100, 200, OWN_FILE_BYTES)
    before = dict(store.index.places)
    with store.blobs.store(blobs | blobs_of(7, seed=5)) as places:
        assert list(places) == list(blobs_of(7, seed=5))
    assert store.index.places == before


def test_nothing_and_nothing_known(store: Store) -> None:
    with store.blobs.store({}) as places:
        assert places == {}
    with pytest.raises(StoreCorrupted) as caught:
        store.blobs.read("0" * 64)
    assert caught.value.metadata == {"digest": "0" * 64}
    assert store.pack_files() == []
    assert store.release([]) is None
    assert store.blobs.compact().packs == 0


def test_what_was_not_committed_is_garbage(store: Store) -> None:
    kept = store.put_all(100)
    lost = blobs_of(300, OWN_FILE_BYTES, seed=1)
    with store.blobs.store(lost):
        assert store.own_files()
    assert not store.own_files()
    assert not list(store.folder.tmp.iterdir())
    store.assert_whole(kept)
    store.reopen()
    (name,) = store.pack_files()
    assert disk.size(store.folder.packs / name) == record_bytes(100)
    store.assert_whole(kept)


@pytest.mark.parametrize("length", [100, OWN_FILE_BYTES])
def test_two_store_the_same_and_one_gives_up(store: Store, length: int) -> None:
    blobs = blobs_of(length)
    with store.blobs.store(blobs) as places:
        with store.blobs.store(blobs):
            pass
        with store.blobs.store(blobs):
            store.release(blobs)
        store.index.commit(places)
    store.assert_whole(blobs)


@pytest.mark.parametrize("length", [100, OWN_FILE_BYTES])
def test_a_broken_blob_is_set_aside_and_storing_it_heals_it(store: Store, length: int) -> None:
    blobs = store.put_all(length, 50, 60)
    broken = next(iter(blobs))
    place = store.index.places[broken]
    store.damage(broken, byte=3)
    for _ in range(2):
        with pytest.raises(StoreCorrupted, match=broken[:12]) as caught:
            store.blobs.read(broken)
        assert caught.value.metadata == {"digest": broken}
    (aside,) = store.set_aside()
    assert aside.name.startswith(broken)
    assert digest_of(aside.read_bytes()) != broken
    assert len(aside.read_bytes()) == length
    assert [store.blobs.read(digest) for digest in blobs if digest != broken] == list(blobs.values())[1:]
    store.put(blobs)
    assert (store.index.places[broken] == place) == (place.pack == OWN_FILE)
    store.assert_whole(blobs)


@pytest.mark.parametrize("length", [100, OWN_FILE_BYTES])
def test_storing_heals_what_nobody_has_read(store: Store, length: int) -> None:
    blobs = store.put_all(length)
    store.damage(next(iter(blobs)))
    store.put(blobs)
    store.assert_whole(blobs)


def test_a_pack_that_is_cut_or_gone(store: Store) -> None:
    blobs = store.put_all(100, 200, 300)
    first, second, third = blobs
    path = store.folder.pack(1)
    whole = path.read_bytes()
    path.write_bytes(whole[: store.index.places[third].data + 10])
    assert store.blobs.read(second) == blobs[second]
    with pytest.raises(StoreCorrupted, match="does not match"):
        store.blobs.read(third)
    store.reopen()
    assert {p.kind for p in store.blobs.check()} == {"out_of_range"}
    # Nothing is appended to a pack that is not what it was.
    more = store.put_all(40, seed=2)
    assert store.index.places[next(iter(more))].pack == 2
    store.close()
    path.unlink()
    store.open()
    with pytest.raises(StoreCorrupted, match="is missing"):
        store.blobs.read(first)
    assert [(p.kind, p.pack) for p in store.blobs.check()] == [("missing_pack", 1)]
    store.put(blobs)
    store.assert_whole(blobs | more)


def test_one_writer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        StoreFolder(tmp_path)
    store.close()
    StoreFolder(tmp_path).close()


def test_a_budget_needs_somewhere_to_put_the_rest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="object storage"):
        Blobs(store.folder, store.index, disk_bytes=1)
    store.close()


def test_few_packs_are_open(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=1)
    blobs = store.put_all(*range(10, 20))
    handles = Handles(store.folder, limit=3)
    for _ in range(2):
        for number in range(1, 11):
            with handles.reading(number) as first, handles.reading(number) as second:
                assert first == second
                assert disk.pread(first, 8, 0) == b"OVTBLOB1"
            assert len(handles) <= 3
    with handles.reading(1) as handle:
        for number in range(2, 11):
            with handles.reading(number):
                pass
        store.folder.pack(1).unlink()
        handles.forget(1)
        assert disk.pread(handle, 8, 0) == b"OVTBLOB1"
    with pytest.raises(FileNotFoundError), handles.reading(1):
        pass
    handles.close()
    assert len(handles) == 0
    assert len(blobs) == 10
    store.close()


def test_writers_at_the_same_time_share_a_sync(store: Store) -> None:
    """While the disk is busy all write; one sync is for all of them."""
    store.put_all(8)
    written, syncs = threading.Semaphore(0), []

    def around(name: str, real: Callable[..., None], args: tuple[object, ...]) -> None:
        real(*args)
        written.release() if name == "write_all" else syncs.append(name)

    blobs = [blobs_of(100, seed=seed) for seed in range(1, 9)]
    busy = store.blobs._parts.writer._open[1].syncing
    with Disk() as faults:
        faults.wrap(["write_all", "sync"], around)
        with busy:
            workers = [threading.Thread(target=store.put, args=(one,)) for one in blobs]
            for worker in workers:
                worker.start()
            for _ in workers:
                written.acquire()
        for worker in workers:
            worker.join()
    assert syncs == ["sync"]
    store.assert_whole({digest: blob for one in blobs for digest, blob in one.items()})
