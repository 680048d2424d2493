"""Bytes of removed blobs come back; what is alive stays readable all the while; what is broken is not passed on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters.packs import Place, disk
from overtone.adapters.packs import compaction as compaction_module
from overtone.adapters.packs.place import record_bytes
from overtone.errors import StoreCorrupted
from support.packs import Disk, Store, blobs_of

RECORD = record_bytes(100)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, pack_bytes=10 * RECORD)
    yield opened
    opened.close()


def test_packs_with_little_alive_go(store: Store) -> None:
    blobs = list(store.put_all(*[100] * 35).items())
    # Alive: 9 of pack 1, 4 of pack 2, none of pack 3, all 5 of the active one.
    kept = dict(blobs[:9] + blobs[10:14] + blobs[30:])
    store.release(digest for digest, _ in blobs if digest not in kept)
    steps: list[tuple[int, int]] = []
    compaction = store.blobs.compact(progress=lambda done, total: steps.append((done, total)))
    assert (compaction.packs, compaction.moved_bytes, compaction.freed_bytes) == (2, 400, 20 * RECORD)
    assert compaction.problems == ()
    assert steps == [(10 * RECORD, 20 * RECORD), (20 * RECORD, 20 * RECORD)]
    assert store.pack_files() == ["00000001.pack", "00000004.pack"]
    store.assert_whole(kept)
    assert store.blobs.compact().packs == 0
    store.reopen()
    store.assert_whole(kept)
    stats = store.blobs.stats()
    assert (stats.packs, stats.pack_bytes, stats.live_bytes) == (2, 19 * RECORD, 1800)


def test_the_active_pack_too(store: Store) -> None:
    blobs = store.put_all(*[100] * 6)
    store.release(list(blobs)[1:])
    assert store.blobs.compact().packs == 1
    assert store.pack_files() == ["00000002.pack"]
    store.assert_whole(dict(list(blobs.items())[:1]))
    store.release(blobs)
    assert store.blobs.compact().packs == 1
    assert store.pack_files() == []


def test_tiny_blobs_are_no_garbage(store: Store) -> None:
    """Although their headers take more than they do."""
    store.put_all(*range(8, 20))
    assert store.blobs.compact(0.8).packs == 0


def test_what_is_broken_stays_where_it_is(store: Store) -> None:
    blobs = store.put_all(*[100] * 12)
    first, second, third = list(blobs)[:3]
    store.release(list(blobs)[3:10])
    store.damage(second)
    for _ in range(2):
        compaction = store.blobs.compact()
        assert [(p.kind, p.digest, p.pack) for p in compaction.problems] == [("bad_digest", second, 1)]
        assert compaction.packs == 0
        assert len(store.set_aside()) == 1
    assert [store.blobs.read(digest) for digest in (first, third)] == [blobs[first], blobs[third]]
    with pytest.raises(StoreCorrupted):
        store.blobs.read(second)
    store.put({second: blobs[second]})
    assert store.blobs.compact().packs == 1
    left = {digest: blobs[digest] for digest in store.index.places}
    assert len(left) == 5
    store.assert_whole(left)


def test_a_pack_that_is_missing_is_reported(store: Store) -> None:
    blobs = store.put_all(*[100] * 12)
    store.release(list(blobs)[:9])
    store.folder.pack(1).unlink()
    compaction = store.blobs.compact()
    assert [(p.kind, p.pack) for p in compaction.problems] == [("missing_pack", 1)]
    store.release(list(blobs)[9:10])
    assert store.blobs.compact().packs == 1


def test_who_stores_meanwhile_loses_nothing(store: Store) -> None:
    """A pack full of blobs that the index has yet to hear of looks empty."""
    old = store.put_all(*[100] * 5)
    new = blobs_of(*[100] * 12, seed=1)
    with store.blobs.store(new) as places:
        store.release(old)
        assert store.blobs.compact().packs == 0
        store.index.commit(places)
    store.assert_whole(new)
    assert store.blobs.compact(0.6).packs == 1
    store.assert_whole(new)


def test_who_releases_meanwhile_brings_nothing_back(store: Store) -> None:
    blobs = store.put_all(*[100] * 12)
    kept = list(blobs)[:3]
    store.release(list(blobs)[3:10])

    def around(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        store.release(kept[:1])
        return real(*args)

    with Disk() as faults:
        faults.wrap(["write_all"], around)
        assert store.blobs.compact().packs == 1
    store.assert_whole({digest: blobs[digest] for digest in [*kept[1:], *list(blobs)[10:]]})
    assert kept[0] not in store.index.places


def test_a_reader_that_comes_too_late_asks_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its question to the index and its look at the disk its blob moves, again and again."""
    blobs = store.put_all(*[100] * 12)
    wanted = next(iter(blobs))
    store.release(list(blobs)[1:10])
    real, numbers = store.index.place_of, []

    def place_of(digest: str) -> Place | None:
        place = real(digest)
        if len(numbers) < 4:
            numbers.append(place.pack if place else 0)
            store.blobs.compact(1.1)
        return place

    monkeypatch.setattr(store.index, "place_of", place_of)
    assert store.blobs.read(wanted) == blobs[wanted]
    assert len(set(numbers)) == 4


def test_memory_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction_module, "_BATCH_BYTES", 250)
    monkeypatch.setattr(compaction_module, "_PAGE", 4)
    blobs = store.put_all(*[100] * 12)
    kept = list(blobs)[1:9]
    store.release([digest for digest in blobs if digest not in kept])
    sizes: list[int] = []

    def around(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        sizes.append(sum(map(len, args[1])) // RECORD)
        return real(*args)

    with Disk() as faults:
        faults.wrap(["write_all"], around)
        store.blobs.compact(1.0)
    assert max(sizes) == 3
    store.assert_whole({digest: blobs[digest] for digest in kept})


def test_readers_writers_and_compaction_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=10 * RECORD)
    stable = store.put_all(*[100] * 40)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            wrong.extend(digest for digest, blob in stable.items() if store.blobs.read(digest) != blob)

    def write(seed: int) -> None:
        for turn in range(15):
            blobs = store.put_all(*[100] * 7, seed=1000 * seed + turn)
            assert all(store.blobs.read(digest) == blob for digest, blob in blobs.items())
            store.release(blobs)

    def compact() -> None:
        while not stop.is_set():
            store.blobs.compact(1.1)

    background = [threading.Thread(target=read), threading.Thread(target=compact)]
    writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in background + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in background:
        thread.join()
    assert not wrong
    store.assert_sound(stable)
    store.blobs.compact()
    assert sum(disk.size(store.folder.packs / name) for name in store.pack_files()) <= 80 * RECORD
    store.close()
