"""Object storage behind the packs: what goes there, what goes from the disk, and how it comes back."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters.packs import Remote, disk, tier, uploads
from overtone.adapters.packs.place import OWN_FILE, Place, record_bytes
from overtone.errors import ConfigError, StoreCorrupted, StoreFailed
from support.packs import Disk, Store, blobs_of, small_own_files
from support.remotes import FragileRemote

RECORD = record_bytes(100)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_own_files(1000):
        yield


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> FragileRemote:
    return FragileRemote("memory:///" if request.param == "memory" else f"file://{tmp_path}/objects/deep")


@pytest.fixture
def store(tmp_path: Path, remote: FragileRemote) -> Iterator[Store]:
    """Of packs of ten blobs, of which one fits the disk beside the active one."""
    opened = Store(tmp_path / "store", remote, pack_bytes=10 * RECORD, disk_bytes=20 * RECORD)
    yield opened
    opened.close()


def age(store: Store, *numbers: int) -> None:
    """The packs were written long ago, in this order."""
    for place, number in enumerate(numbers):
        os.utime(store.folder.pack(number), (1000 + place, 1000 + place))


def evicted(store: Store) -> dict[str, bytes]:
    """35 blobs: packs 1 and 2 are remote only, 3 is on both sides, 4 grows."""
    blobs = store.put_all(*[100] * 35)
    store.blobs.upload()
    assert store.blobs.stats().evicted_packs == 2
    return blobs


def uploaded(store: Store, remote: FragileRemote) -> dict[str, bytes]:
    """35 blobs in 4 packs on both sides."""
    store.options["disk_bytes"] = 0
    store.reopen()
    blobs = store.put_all(*[100] * 35)
    store.blobs.upload()
    assert remote.objects() == {f"packs/0000000{number}.pack" for number in (1, 2, 3, 4)}
    return blobs


def test_sealed_packs_go_there_and_the_oldest_go_from_here(store: Store, remote: FragileRemote) -> None:
    blobs = uploaded(store, remote)
    age(store, 2, 1, 3)
    store.options["disk_bytes"] = 20 * RECORD
    store.reopen()
    store.blobs.upload()
    assert store.pack_files() == ["00000003.pack", "00000004.pack"]
    stats = store.blobs.stats()
    assert stats.remote is not None
    assert (stats.packs, stats.evicted_packs, stats.remote.pending_packs, stats.remote.evictions) == (4, 2, 0, 2)
    assert stats.remote.last_error == ""
    store.assert_whole(blobs)


def test_the_least_recently_read_goes_first(tmp_path: Path, remote: FragileRemote) -> None:
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD)
    blobs = list(store.put_all(*[100] * 35))
    age(store, 1, 2, 3)
    store.blobs.read(blobs[0])
    store.close()
    store.options["disk_bytes"] = 30 * RECORD
    store.open()
    age(store, 1, 2, 3)
    store.blobs.read(blobs[0])
    store.blobs.upload()
    assert store.pack_files() == ["00000001.pack", "00000003.pack", "00000004.pack"]
    store.close()


def test_what_is_read_is_kept(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    wanted = next(iter(blobs))
    remote.asked.clear()
    for _ in range(3):
        assert store.blobs.read(wanted) == blobs[wanted]
    assert remote.asked.count("get") == 1
    assert store.index.places[wanted].pack == 4
    store.reopen()
    assert store.blobs.read(wanted) == blobs[wanted]
    store.assert_whole(blobs)


def test_what_is_evicted_is_not_stored_again(store: Store) -> None:
    blobs = evicted(store)
    before = dict(store.index.places)
    store.put(blobs)
    assert store.index.places == before


def test_a_disk_that_refuses_keeps_nobody_from_reading(store: Store) -> None:
    blobs = evicted(store)
    wanted = next(iter(blobs))
    with Disk() as faults:
        faults.refuse("write_all")
        assert store.blobs.read(wanted) == blobs[wanted]
    assert store.index.places[wanted].pack == 1
    store.assert_whole(blobs)


def test_one_asks_for_all(store: Store, remote: FragileRemote, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = evicted(store)
    wanted, readers = next(iter(blobs)), 6
    asking, real = threading.Semaphore(0), remote.get
    read: list[bytes] = []

    def get(name: str, offset: int, length: int) -> bytes | None:
        for _ in range(2 * readers + 1):
            asking.acquire()
        return real(name, offset, length)

    real_place_of = store.index.place_of
    monkeypatch.setattr(store.index, "place_of", lambda digest: (real_place_of(digest), asking.release())[0])
    monkeypatch.setattr(remote, "get", get)
    remote.asked.clear()
    workers = [threading.Thread(target=lambda: read.append(store.blobs.read(wanted))) for _ in range(readers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert read == [blobs[wanted]] * readers
    assert remote.asked.count("get") == 1


def test_storage_that_is_down_hurts_only_who_needs_it(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    far, near = list(blobs)[:20], list(blobs)[20:]
    remote.down = True
    with pytest.raises(StoreFailed) as caught:
        store.blobs.read(far[0])
    assert caught.value.retry_after_s == 1.0
    assert [store.blobs.read(digest) for digest in near] == [blobs[digest] for digest in near]
    more = store.put_all(*[100] * 15, *[1500] * 2, seed=1)
    store.release(near[:2])
    store.blobs.compact()
    assert {digest: store.blobs.read(digest) for digest in more} == more
    with pytest.raises(StoreFailed):
        store.blobs.upload()
    stats = store.blobs.stats().remote
    assert stats is not None
    assert stats.failed_passes >= 1
    assert stats.pending_packs == 1
    assert stats.last_error == "cannot reach object storage"
    assert stats.fetch_failures == 1
    remote.down = False
    store.blobs.upload()
    stats = store.blobs.stats().remote
    assert stats is not None
    assert (stats.pending_packs, stats.last_error) == (0, "")
    left = {digest: blob for digest, blob in (blobs | more).items() if digest not in near[:2]}
    store.assert_whole(left)


def test_the_thread_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the other side answers, without being asked to."""
    monkeypatch.setattr(tier, "_FIRST_RETRY_S", 0.001)
    remote, attempts = FragileRemote(), []
    real = remote.put

    def put(name: str, chunks: Any) -> Any:
        attempts.append(name)
        if len(attempts) < 4:
            raise StoreFailed("not now")
        return real(name, chunks)

    monkeypatch.setattr(remote, "put", put)
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD)
    store.put_all(*[100] * 11)
    remote.got_pack.wait()
    store.close()
    assert remote.objects() == {"packs/00000001.pack"}


def test_nobody_waits_for_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, begun, go_on = FragileRemote(), threading.Event(), threading.Event()
    real = remote.put

    def put(name: str, chunks: Any) -> Any:
        begun.set()
        go_on.wait()
        return real(name, chunks)

    monkeypatch.setattr(remote, "put", put)
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD)
    blobs = store.put_all(*[100] * 11)
    begun.wait()
    more = store.put_all(*[100] * 20, 1500, seed=1)
    assert {digest: store.blobs.read(digest) for digest in blobs | more} == blobs | more
    store.release(more)
    assert store.blobs.compact().packs > 1
    go_on.set()
    store.blobs.upload()
    store.assert_whole(blobs)
    store.close()


def test_the_active_pack_goes_when_it_is_old(tmp_path: Path) -> None:
    remote = FragileRemote()
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD, upload_age_s=0.001)
    store.put_all(100)
    remote.got_pack.wait()
    store.close()
    assert remote.objects() == {"packs/00000001.pack"}


def test_a_pack_that_grew_goes_again(store: Store, remote: FragileRemote) -> None:
    store.put_all(100)
    store.blobs.upload()
    first = store.blobs._parts.ledger.get(1)
    blobs = store.put_all(*[100] * 3, seed=1)
    store.blobs.upload()
    second = store.blobs._parts.ledger.get(1)
    assert first is not None
    assert second is not None
    assert (first.size, second.size) == (RECORD, 4 * RECORD)
    blobs |= store.put_all(100, seed=2)
    store.damage(last := list(blobs)[-1])
    with pytest.raises(StoreCorrupted):
        store.blobs.read(last)
    store.put(blobs)
    store.blobs.upload()
    remote.asked.clear()
    store.blobs.upload()
    assert "put" not in remote.asked
    store.assert_whole(blobs)


def test_closing_stops_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_CHUNK", 100)
    remote, begun = FragileRemote(), threading.Event()
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD)

    def around(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        begun.set()
        assert store.blobs._tier is not None
        store.blobs._tier._uploader._stopping.wait()
        return real(*args)

    with Disk() as faults:
        faults.wrap(["pread"], around)
        blobs = store.put_all(*[100] * 11)
        begun.wait()
        store.close()
    assert remote.objects() == set()
    store.open()
    store.blobs.upload()
    assert remote.objects() == {"packs/00000001.pack", "packs/00000002.pack"}
    store.assert_whole(blobs)
    store.close()


def test_closing_stops_who_waits_for_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier.Tier, "_run", lambda tier: None)
    store = Store(tmp_path, FragileRemote())
    store.put_all(100)
    store.close()
    with pytest.raises(StoreFailed, match="being closed"):
        store.blobs.upload()


def test_what_somebody_changed_over_there_stays_here(store: Store, remote: FragileRemote) -> None:
    blobs = uploaded(store, remote)
    age(store, 1, 2, 3)
    remote.overwrite("1.pack", 60)
    remote.lose("2.pack")
    store.options["disk_bytes"] = 20 * RECORD
    store.reopen()
    remote.asked.clear()
    for _ in range(2):
        store.blobs.upload()
    assert remote.asked.count("put") == 2
    assert {f"packs/0000000{number}.pack" for number in (1, 2, 3, 4)} == remote.objects()
    assert store.blobs.stats().evicted_packs == 2
    store.assert_whole(blobs)


def test_a_blob_that_is_broken_over_there(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    first, second = list(blobs)[:2]
    remote.overwrite("1.pack", store.index.places[first].data)
    assert [(p.kind, p.pack) for p in store.blobs.check()] == [("missing_remote", 1)]
    with pytest.raises(StoreCorrupted, match="object storage") as caught:
        store.blobs.read(first)
    assert caught.value.metadata == {"digest": first}
    (aside,) = store.set_aside()
    assert aside.name.startswith(first)
    assert store.blobs.read(second) == blobs[second]
    store.put({first: blobs[first]})
    assert {digest: store.blobs.read(digest) for digest in blobs} == blobs
    store.assert_whole(blobs)


def test_a_pack_that_is_gone_over_there(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    remote.lose("1.pack")
    for _ in range(2):
        with pytest.raises(StoreCorrupted, match="is missing"):
            store.blobs.read(next(iter(blobs)))
    assert [(p.kind, p.pack) for p in store.blobs.check()] == [("missing_remote", 1)]
    store.put(dict(list(blobs.items())[:1]))
    assert store.blobs.read(next(iter(blobs))) == next(iter(blobs.values()))


def test_another_bucket_is_no_loss(store: Store, remote: FragileRemote, tmp_path: Path) -> None:
    blobs = evicted(store)
    store.close()
    store.remote = FragileRemote()
    store.open()
    with pytest.raises(StoreFailed, match="not the one"):
        store.blobs.read(next(iter(blobs)))
    with pytest.raises(StoreFailed, match="not the one"):
        store.blobs.upload()
    assert store.remote.objects() == set()
    store.close()
    store.remote = remote
    store.open()
    store.assert_whole(blobs)


def test_what_breaks_here_comes_from_there(tmp_path: Path, remote: FragileRemote) -> None:
    store = Store(tmp_path / "s", remote, pack_bytes=10 * RECORD)
    blobs = store.put_all(*[100] * 12, 1500)
    store.blobs.upload()
    first, *_, large = blobs
    store.damage(first)
    store.damage(large)
    store.assert_sound({digest: blobs[digest] for digest in (first, large)})
    assert len(store.set_aside()) == 2
    store.assert_whole(blobs)
    store.close()


def test_compaction_cleans_up_over_there(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    # Of pack 1 (remote only) nothing is left, of 2 (remote only) little, of 3 (on both sides) little.
    kept = {digest: blob for n, (digest, blob) in enumerate(blobs.items()) if n in (11, 21) or n >= 30}
    store.release(blobs.keys() - kept.keys())
    assert store.blobs.compact().packs == 2
    store.blobs.upload()
    assert remote.objects() == {"packs/00000002.pack", "packs/00000004.pack"}
    store.assert_whole(kept)
    assert store.blobs.compact().packs == 1
    store.reopen()
    store.blobs.upload()
    assert remote.objects() == {"packs/00000004.pack"}
    store.assert_whole(kept)


def test_files_of_their_own(tmp_path: Path, remote: FragileRemote) -> None:
    store = Store(tmp_path / "s", remote)
    blobs = store.put_all(1500, 1600, 1700, 50)
    first, second, third, small = blobs
    store.close()
    store.options["disk_bytes"] = 4000
    for number, digest in enumerate([second, first, third]):
        os.utime(store.folder.own(digest), (1000 + number, 1000 + number))
    store.open()
    store.blobs.upload()
    assert {name for name in remote.objects() if name.startswith("blobs")} == {
        f"blobs/{digest[0]}/{digest}" for digest in (first, second, third)
    }
    assert store.own_files() == {first, third}
    store.blobs.read(third)
    assert store.blobs.read(second) == blobs[second]
    store.blobs.upload()
    assert store.own_files() == {second, third}
    store.release([second, first])
    store.blobs.upload()
    assert {name for name in remote.objects() if name.startswith("blobs")} == {f"blobs/{third[0]}/{third}"}
    store.assert_whole({third: blobs[third], small: blobs[small]})
    store.close()


def test_own_files_of_a_process_that_was_killed(tmp_path: Path, remote: FragileRemote) -> None:
    """It uploaded some and not others, and of those that it removed it told nobody."""
    store = Store(tmp_path / "s", remote)
    blobs = store.put_all(1500, 1600, 1700)
    first, second, _ = blobs
    store.blobs.upload()
    remote.down = True
    store.release([first])
    blobs |= store.put_all(1800, seed=1)
    remote.lose(second)
    store.reopen()
    remote.down = False
    store.blobs.upload()
    assert remote.objects() == {f"blobs/{digest[0]}/{digest}" for digest in blobs if digest != first}
    store.assert_whole({digest: blob for digest, blob in blobs.items() if digest != first})
    store.close()


def test_an_own_file_that_is_broken_over_there(tmp_path: Path, remote: FragileRemote) -> None:
    store = Store(tmp_path / "s", remote, disk_bytes=1)
    blobs = store.put_all(1500)
    (digest,) = blobs
    store.blobs.upload()
    assert store.own_files() == set()
    remote.overwrite(digest, 3)
    with pytest.raises(StoreCorrupted):
        store.blobs.read(digest)
    assert [(p.kind, p.digest) for p in store.blobs.check()] == [("missing_file", digest)]
    store.put(blobs)
    store.blobs.upload()
    store.blobs.upload()
    assert store.own_files() == set()
    store.assert_whole(blobs)
    store.close()


def test_an_own_file_whose_length_an_older_catalogue_did_not_know(tmp_path: Path, remote: FragileRemote) -> None:
    store = Store(tmp_path / "s", remote)
    blobs = store.put_all(1500)
    (digest,) = blobs
    store.index.places[digest] = Place(OWN_FILE, 0, 0)
    assert store.blobs.check() == []
    store.close()
    store.options["disk_bytes"] = 1
    store.open()
    store.blobs.upload()
    assert store.own_files() == set()
    assert store.blobs.check() == []
    store.assert_sound(blobs)
    store.close()


def test_one_bad_answer_deletes_nothing(tmp_path: Path, remote: FragileRemote, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s", remote, disk_bytes=1)
    blobs = store.put_all(1500)
    (digest,) = blobs
    store.blobs.upload()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "get", lambda name, offset, length: bytes(length))
        with pytest.raises(StoreCorrupted):
            store.blobs.read(digest)
    store.reopen()
    assert [(p.kind, p.digest) for p in store.blobs.check()] == [("missing_file", digest)]
    assert store.blobs._parts.ledger.is_lost(digest)
    # What was doubted is uploaded again before it leaves the disk.
    assert store.blobs.read(digest) == blobs[digest]
    store.blobs.upload()
    store.blobs.upload()
    assert not store.blobs._parts.ledger.is_lost(digest)
    assert store.own_files() == set()
    store.assert_whole(blobs)
    store.close()


def test_an_upload_heals_what_is_lost_over_there(store: Store, remote: FragileRemote) -> None:
    """Although it was found sound on the disk once."""
    store.options["disk_bytes"] = 1 << 20
    store.reopen()
    blobs = store.put_all(*[100] * 35)
    store.put(blobs)
    store.blobs.upload()
    old = {digest for digest, place in store.index.places.items() if place.pack == 1}
    remote.lose("1.pack")
    store.folder.pack(1).unlink()
    store.blobs._parts.handles.forget(1)
    with pytest.raises(StoreCorrupted):
        store.blobs.read(next(iter(old)))
    store.put(blobs)
    assert all(place.pack != 1 for place in store.index.places.values())
    store.assert_whole(blobs)


def test_what_comes_back_does_not_outgrow_the_disk(
    store: Store, remote: FragileRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for a pass but the reads themselves."""
    blobs = evicted(store)
    trimmed = threading.Event()
    real = store.blobs._tier._evictor.trim  # type: ignore[union-attr]
    monkeypatch.setattr(
        store.blobs._tier._evictor,  # type: ignore[union-attr]
        "trim",
        lambda *arguments: (real(*arguments), trimmed.set()),
    )
    for digest in [digest for digest, place in store.index.places.items() if place.pack in (1, 2)]:
        store.blobs.read(digest)
    for _ in range(20):
        assert trimmed.wait(20)
        trimmed.clear()
        if sum(path.stat().st_size for path in store.folder.packs.iterdir()) <= 20 * RECORD:
            break
    else:
        pytest.fail("the disk is too full")
    store.assert_whole(blobs)


def test_a_store_opened_without_its_object_storage(store: Store, remote: FragileRemote) -> None:
    blobs = evicted(store)
    store.close()
    store.remote, store.options = None, {"pack_bytes": 10 * RECORD}
    store.open()
    with pytest.raises(StoreFailed, match="none is configured"):
        store.blobs.read(next(iter(blobs)))
    with pytest.raises(StoreCorrupted):
        store.blobs.read("0" * 64)
    near = dict(list(blobs.items())[20:])
    assert {digest: store.blobs.read(digest) for digest in near} == near
    assert [(p.kind, p.pack) for p in store.blobs.check()] == [("missing_remote", 1), ("missing_remote", 2)]
    # Numbers of packs that are over there are not given again.
    store.release(near)
    store.blobs.compact()
    store.reopen()
    more = store.put_all(*[100] * 12, seed=1)
    assert {store.index.places[digest].pack for digest in more} == {5, 6}
    # What is stored again is here again.
    again = dict(list(blobs.items())[:1])
    store.put(again)
    assert {digest: store.blobs.read(digest) for digest in again} == again
    store.close()
    store.remote = remote
    store.open()
    store.assert_whole(dict(list(blobs.items())[:20]) | more)


def test_the_name_of_the_store_stays(store: Store) -> None:
    evicted(store)
    known = json.loads((store.folder.root / "remote.json").read_text())
    store.reopen()
    store.blobs.upload()
    assert json.loads((store.folder.root / "remote.json").read_text())["store"] == known["store"]
    store.close()
    (store.folder.root / "remote.json").write_text('{"store": 1, "packs": {"x": {}}}')
    with pytest.raises(ConfigError, match=r"remote\.json"):
        store.open()
    store.folder.close()
    (store.folder.root / "remote.json").write_text(json.dumps(known))
    store.open()


def test_two_stores_share_a_bucket(tmp_path: Path) -> None:
    remote = FragileRemote()
    stores = [Store(tmp_path / name, remote, pack_bytes=10 * RECORD, disk_bytes=1) for name in ("a", "b")]
    contents = [store.put_all(*[100] * 25, 1500, seed=seed) for seed, store in enumerate(stores)]
    for store, blobs in zip(stores, contents, strict=True):
        store.blobs.upload()
        store.assert_whole(blobs)
    stores[0].release(contents[0])
    stores[0].blobs.compact()
    stores[0].blobs.upload()
    stores[1].assert_whole(contents[1])
    for store in stores:
        store.close()


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://host/x", "s3:/", "az://account/container"])
def test_what_is_no_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        Remote(url)
    assert caught.value.field == "remote"


def test_obstore_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"overtone\[remote\]"):
        Remote("memory:///")


def test_uploads_are_what_the_index_knows(store: Store, remote: FragileRemote) -> None:
    """Not what somebody stores and has not committed."""
    blobs = blobs_of(*[100] * 12)
    with store.blobs.store(blobs) as places:
        store.blobs.upload()
        assert remote.objects() == set()
        store.index.commit(places)
    store.blobs.upload()
    assert remote.objects() == {"packs/00000001.pack", "packs/00000002.pack"}
    assert disk.size(store.folder.pack(2)) == 2 * RECORD


def test_readers_writers_evictions_and_compaction_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path, FragileRemote(), pack_bytes=10 * RECORD, disk_bytes=15 * RECORD)
    stable = store.put_all(*[100] * 30, 1500)
    stop, wrong = threading.Event(), []

    def until_stopped(turn: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    turn()
            except Exception as error:
                wrong.append(error)

        return threading.Thread(target=run)

    def read() -> None:
        wrong.extend(digest for digest, blob in stable.items() if store.blobs.read(digest) != blob)

    def write() -> None:
        for turn in range(20):
            blobs = store.put_all(*[100] * 7, 1600, seed=1 + turn)
            assert all(store.blobs.read(digest) == blob for digest, blob in blobs.items())
            store.release(blobs)

    background = [
        until_stopped(read),
        until_stopped(lambda: store.blobs.compact(0.9)),
        until_stopped(store.blobs.upload),
    ]
    writer = threading.Thread(target=write)
    for thread in [*background, writer]:
        thread.start()
    writer.join()
    stop.set()
    for thread in background:
        thread.join()
    assert not wrong
    assert not store.set_aside()
    store.blobs.upload()
    store.assert_sound(stable)
    stats = store.blobs.stats().remote
    assert stats is not None
    assert stats.evictions > 0
    assert stats.fetches > 0
    store.close()


def test_what_a_killed_process_left_over_there_goes(store: Store, remote: FragileRemote) -> None:
    """It uploaded a pack, and ended before it wrote that down; the pack is gone meanwhile."""
    blobs = uploaded(store, remote)
    remote.put(store.blobs._parts.ledger.pack_name(9), [b"x"])
    remote.put("another/packs/00000009.pack", [b"x"])
    store.blobs.upload()
    assert "packs/00000009.pack" in remote.objects()
    store.reopen()
    store.blobs.upload()
    left = [name for name in Remote.names(remote, "") if name.endswith("9.pack")]
    assert left == ["another/packs/00000009.pack"]
    store.assert_whole(blobs)


def test_a_pack_that_is_too_short_is_not_uploaded_in_vain(store: Store, remote: FragileRemote) -> None:
    store.options["disk_bytes"] = 0
    store.close()
    store.remote = None
    store.open()
    store.put_all(*[100] * 15)
    os.truncate(store.folder.pack(1), 5 * RECORD)
    store.close()
    store.remote = remote
    store.open()
    store.blobs.upload()
    assert remote.objects() == {"packs/00000002.pack"}


def test_what_is_not_a_whole_pack_goes_when_the_store_is_closed(tmp_path: Path) -> None:
    remote = FragileRemote()
    store = Store(tmp_path, remote, pack_bytes=10 * RECORD, upload_age_s=1000.0)
    blobs = store.put_all(*[100] * 3)
    store.reopen()
    assert remote.objects() == {"packs/00000001.pack"}
    store.put_all(*[100] * 3, seed=1)
    remote.down = True
    store.reopen()  # which must not fail
    remote.down = False
    store.assert_sound(blobs)
    store.close()
