"""Ids, versions, options and leases, as the services use them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overtone.adapters import AdapterFiles, AdapterStore
from overtone.adapters.base import BaseDescription
from overtone.adapters.lease import Share
from overtone.adapters.store import Wanted
from overtone.adapters.upload import Upload
from overtone.errors import (
    AdapterExists,
    AdapterMemoryFull,
    AdapterNotFound,
    BaseModelMismatch,
    ConfigError,
    EtagMismatch,
    InvalidAdapter,
    InvalidRequest,
    TooLarge,
    UnsupportedAdapter,
)
from support.adapters import BASE, SHAPES, adapter_files, files_of, make_loca_folder, open_store, put
from support.peft_base import base_of
from support.peft_folders import peft_config, peft_folder
from support.stored import assert_same_deltas, places_on_disk, versions_on_disk
from support.tiny import tiny_model

Make = Callable[[int], Path]


def blobs(store: AdapterStore) -> list[str]:
    """The versions on disk; there is nothing else, and it is as it should be."""
    assert not store.check(deep=True)
    return versions_on_disk(store._config.root)


def test_a_record_says_what_was_stored(store: AdapterStore, loca: Make) -> None:
    record = put(store, loca(1), "a", labels={"k": "v"})
    assert store.get("a") == record
    assert (record.id, record.family, record.pinned, record.labels) == ("a", "loca", False, {"k": "v"})
    assert (record.module_count, record.parameter_count) == (len(SHAPES), 12 * len(SHAPES))
    assert record.versions == (record.digest,)
    assert blobs(store) == [record.digest]
    assert record.create_time == record.update_time
    assert abs((datetime.now(UTC) - record.create_time).total_seconds()) < 60
    assert (record.state, record.tenant, record.last_used_time) == ("ready", "", None)
    assert record.base_fingerprint == BASE.fingerprint
    assert store.residency_state(record.digest) == "resident"
    assert (store.stats().memory_load_count, store.stats().disk_load_count) == (1, 0)
    assert not list((store._config.root / "adapters" / "tmp").iterdir())


def test_equal_content_changes_options_only(store: AdapterStore, loca: Make) -> None:
    first = put(store, loca(1), "a", labels={"k": "v"})
    assert put(store, loca(1), "a") == first
    pinned = put(store, loca(1), "a", pinned=True)
    assert (pinned.uid, pinned.digest, pinned.labels, pinned.pinned) == (first.uid, first.digest, {"k": "v"}, True)
    assert pinned.etag != first.etag
    assert pinned.update_time > first.update_time
    assert put(store, loca(1), "a", pinned=True, labels={}).labels == {}


def test_other_content_is_a_new_version_and_old_ones_stay(store: AdapterStore, loca: Make) -> None:
    one, two = put(store, loca(1), "a"), put(store, loca(2), "a")
    assert two.uid == one.uid
    assert two.versions == (two.digest, one.digest)
    for reference, digest in {"a": two.digest, f"adapters/a@{one.digest[:12]}": one.digest}.items():
        with store.acquire(reference) as lease:
            assert (lease.shares, lease.adapter.digest) == ((Share("a", digest),), digest)
    assert put(store, loca(1), "a").versions == (one.digest, two.digest)


def test_create_only_and_validate_only(store: AdapterStore, loca: Make) -> None:
    would_be = put(store, loca(1), "a", validate_only=True, create_only=True)
    assert store.list(0, "") == ([], "")
    assert blobs(store) == []
    record = put(store, loca(1), "a", create_only=True)
    assert record.uid != would_be.uid
    mine = {
        "uid": record.uid,
        "etag": record.etag,
        "create_time": record.create_time,
        "update_time": record.update_time,
    }
    assert replace(would_be, **mine) == record
    for validate_only in (False, True):
        with pytest.raises(AdapterExists):
            put(store, loca(2), "a", create_only=True, validate_only=validate_only)
    assert put(store, loca(2), "a", validate_only=True).versions[1] == record.digest
    assert store.get("a") == record


def test_update(store: AdapterStore, loca: Make) -> None:
    record = put(store, loca(1), "a")
    assert store.update("a") == record
    changed = store.update("a", pinned=True, labels={"k": "v"}, etag=record.etag)
    assert (changed.pinned, changed.labels) == (True, {"k": "v"})
    assert store.residency_state(record.digest) == "resident"
    with pytest.raises(EtagMismatch):
        store.update("a", pinned=False, etag=record.etag)
    with pytest.raises(EtagMismatch):
        store.delete("a", etag=record.etag)
    assert store.get("a") == changed
    store.delete("a", etag=changed.etag)


def test_unknown_names(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    calls: list[Callable[[str], object]] = [store.get, store.update, store.delete, store.acquire]
    for call in calls:
        with pytest.raises(AdapterNotFound, match="nobody") as caught:
            call("nobody")
        assert caught.value.metadata["adapter"] == "nobody"
    with pytest.raises(AdapterNotFound, match="no version 0123456789ab"):
        store.acquire("a@0123456789ab")


@pytest.mark.parametrize("bad", ["", ".a", "a-", "../a", "a/b", "a b", "ä", "a\n", "a" * 129, "a\0"])
def test_bad_ids(store: AdapterStore, loca: Make, bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(bad),
        lambda: store.acquire(bad),
        lambda: store.delete(bad),
        lambda: put(store, loca(1), bad),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.field in ("adapter_id", "adapter")
    assert put(store, loca(1), "A.b_c-" + "9" * 122).id


@pytest.mark.parametrize("version", ["", "0123", "0123456789aB", "g" * 12, "0" * 65, "a@b"])
def test_bad_versions(store: AdapterStore, version: str) -> None:
    with pytest.raises(InvalidRequest):
        store.acquire(f"a@{version}")


@pytest.mark.parametrize(
    "labels", [{"": "v"}, {"k" * 64: ""}, {"k": "v" * 257}, {"k": "\n"}, {"\0": ""}, {str(i): "" for i in range(65)}]
)
def test_bad_labels(store: AdapterStore, loca: Make, labels: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        put(store, loca(1), "a", labels=labels)
    assert caught.value.field == "labels"


def test_pages(store: AdapterStore, loca: Make) -> None:
    names = [f"a{i}" for i in range(7)]
    for name in reversed(names):
        put(store, loca(1), name)
    seen, token = [], ""
    while True:
        records, token = store.list(3, token)
        seen += [record.id for record in records]
        if not token:
            break
    assert seen == names
    assert len(store.list(0, "")[0]) == len(store.list(5000, "")[0]) == 7
    with pytest.raises(InvalidRequest) as caught:
        store.list(-1, "")
    assert caught.value.field == "page_size"
    for bad in ("x", "????", "ä", "Li4v", "YQ==\n"):
        with pytest.raises(InvalidRequest) as caught:
            store.list(1, bad)
        assert caught.value.field == "page_token"
    assert store.stats().registered_count == 7
    assert len(blobs(store)) == 1


def test_uploads(store: AdapterStore, loca: Make, tmp_path: Path) -> None:
    config, weights = files_of(loca(1))
    with store.begin_upload() as upload:
        upload.write("adapter_config.json", config)
        upload.write("adapter_model.safetensors", weights)
        with pytest.raises(InvalidRequest, match="follow each other"):
            upload.write("adapter_config.json", b" ")
        for name, message in {
            "adapter_model.bin": "pickle",
            "../x": "no file",
            "": "no file",
            "a\0": "no file",
        }.items():
            with pytest.raises(InvalidAdapter, match=message):
                upload.write(name, b"")
        with pytest.raises(TooLarge):
            upload.write("adapter_model.safetensors", bytes(1 << 22))
    with pytest.raises(InvalidRequest, match="ended"):
        upload.write("adapter_config.json", config)
    with store.begin_upload() as upload, pytest.raises(TooLarge):
        upload.write("adapter_config.json", bytes(65_537))
    with store.begin_upload() as upload:
        upload.write("adapter_config.json", config)
        with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing"):
            store.commit_upload(upload, "a")
    assert not list((tmp_path / "store" / "adapters" / "tmp").iterdir())


def test_delete_under_a_lease(store: AdapterStore, loca: Make) -> None:
    record = put(store, loca(1), "a", pinned=True)
    lease, other = store.acquire("a"), store.acquire("a")
    store.delete("a")
    with pytest.raises(AdapterNotFound):
        store.acquire("a")
    lease.release()
    lease.release()
    assert store.residency_state(record.digest) == "resident"
    assert other.adapter.deltas.keys() == SHAPES.keys()
    assert blobs(store) == [record.digest]
    other.release()
    assert blobs(store) == []
    assert store.stats().resident_bytes == 0


def test_content_that_comes_back_before_the_last_lease_ends_stays(store: AdapterStore, loca: Make) -> None:
    lease = [put(store, loca(1), "a"), store.acquire("a")][1]
    store.delete("a")
    again = put(store, loca(1), "b")
    lease.release()  # type: ignore[union-attr]
    assert blobs(store) == [again.digest]
    store.acquire("b").release()


def test_deleting_one_of_two_ids_with_one_content(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    put(store, loca(1), "b")
    store.delete("a")
    store.acquire("b").release()
    store.delete("b")
    assert blobs(store) == []


def test_replace_under_a_lease(store: AdapterStore, loca: Make) -> None:
    one = put(store, loca(1), "a")
    with store.acquire("a") as lease:
        two = put(store, loca(2), "a")
        assert lease.adapter.digest == one.digest
        with store.acquire("a") as current:
            assert current.adapter.digest == two.digest
    store.delete("a")
    assert blobs(store) == []


def test_single_flight_and_load_times(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path)) as before:
        put(before, loca(1), "a")
    with closing(open_store(tmp_path)) as store:
        seconds: list[float] = []
        store.on_load = seconds.append
        with ThreadPoolExecutor(8) as pool:
            leases = list(pool.map(lambda _: store.acquire("a"), range(32)))
        stats = store.stats()
        assert len(seconds) == stats.load_count == stats.disk_load_count == 1
        assert len({id(lease.adapter) for lease in leases}) == 1
        for lease in leases:
            lease.release()
        assert store.stats().leased_count == 0


def test_an_upload_is_in_memory_at_once(store: AdapterStore, loca: Make) -> None:
    """And what it brings there is what a load from disk brings."""
    seconds: list[float] = []
    store.on_load = seconds.append
    put(store, loca(1), "a")
    uploaded = store.acquire("a")
    assert not seconds
    stats = store.stats()
    assert (stats.memory_load_count, stats.disk_load_count, stats.hit_count, stats.miss_count) == (1, 0, 1, 0)
    loaded = store._versions.read(uploaded.adapter.digest)
    assert len(seconds) == 1
    assert_same_deltas(uploaded.adapter.deltas, loaded.deltas)
    uploaded.release()


def test_memory(tmp_path: Path, loca: Make) -> None:
    probe = open_store(tmp_path / "probe")
    used = [put(probe, loca(seed), str(seed)) and probe.stats().resident_bytes for seed in (1, 2)]
    store = open_store(tmp_path / "store", memory_bytes=used[1] + (used[1] - used[0]) // 2)
    records = {str(seed): put(store, loca(seed), str(seed), pinned=seed == 1) for seed in (1, 2, 3)}
    for name in ("2", "3"):
        store.acquire(name).release()
        states = {name: store.residency_state(record.digest) for name, record in records.items()}
        assert states == {"1": "resident", "2": "stored", "3": "stored"} | {name: "resident"}
    with store.acquire("3"):
        with pytest.raises(AdapterMemoryFull) as caught:
            store.acquire("2")
        assert caught.value.retry_after_s == 1.0
        with pytest.raises(AdapterMemoryFull):
            store.update("2", pinned=True)
        assert not store.get("2").pinned
        with pytest.raises(AdapterMemoryFull):
            put(store, loca(4), "4", pinned=True)
        assert len(blobs(store)) == 3
    large = make_loca_folder(tmp_path / "large", SHAPES, n=900, seed=9)
    with pytest.raises(AdapterMemoryFull, match="never fits"):
        put(store, large, "large")
    assert len(blobs(store)) == 3


def test_one_process_at_a_time(tmp_path: Path, store: AdapterStore) -> None:
    with pytest.raises(ConfigError, match="in use"):
        open_store(tmp_path / "store")
    store.close()
    store.close()
    open_store(tmp_path / "store").close()


def test_everything_at_once(store: AdapterStore, loca: Make) -> None:
    """Uploads, deletions and leases of the same few contents from many threads: a lease is always sound, and in the end
    exactly what the catalogue names is on disk."""
    folders = [loca(seed) for seed in range(3)]
    for seed in range(3):
        put(store, folders[seed], f"id{seed}")
    failures: list[BaseException] = []
    stop = threading.Event()

    def change(worker: int) -> None:
        for i in range(25):
            put(store, folders[(worker + i) % 3], f"id{i % 3}")
            if i % 4 == worker:
                try:
                    store.delete(f"id{(i + worker) % 3}")
                except AdapterNotFound:
                    continue

    def lease(worker: int) -> None:
        while not stop.is_set():
            try:
                with store.acquire(f"id{worker}") as held:
                    assert held.adapter.deltas.keys() == SHAPES.keys()
            except AdapterNotFound:
                continue
            except BaseException as error:
                failures.append(error)
                raise

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(lease, i) for i in range(3)]
        for future in [pool.submit(change, i) for i in range(2)]:
            future.result()
        stop.set()
        for future in readers:
            future.result()
    assert not failures
    assert set(blobs(store)) == {digest for record in store.list(0, "")[0] for digest in record.versions}


def test_another_base_of_the_same_shapes_is_never_answered_for(tmp_path: Path, loca: Make) -> None:
    """The adapter says nothing of its base; the store remembers which one it was checked against."""
    store = open_store(tmp_path)
    put(store, loca(1), "a")
    store.close()
    other = open_store(tmp_path, base=BaseDescription("another", "0" * 64, SHAPES))
    with pytest.raises(BaseModelMismatch) as caught:
        other.acquire("a")
    assert caught.value.field == "base_fingerprint"
    put(other, loca(1), "a")
    other.acquire("a").release()
    other.close()


def test_a_store_without_its_catalogue_is_not_wiped(tmp_path: Path, loca: Make) -> None:
    store = open_store(tmp_path)
    put(store, loca(1), "a")
    kept = blobs(store)
    store.close()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (tmp_path / "adapters").glob("catalogue.sqlite3*"):
        file.rename(moved / file.name)
    with pytest.raises(ConfigError, match="catalogue is missing or empty"):
        open_store(tmp_path)
    for file in moved.iterdir():
        file.rename(tmp_path / "adapters" / file.name)
    store = open_store(tmp_path)
    assert blobs(store) == kept
    assert store.get("a").digest == kept[0]
    store.close()


def test_drawn_matrices_count_like_uploaded_bytes(tmp_path: Path) -> None:
    """A few kilobytes that name a seed must not fill the disk."""
    model = tiny_model()
    config = peft_config("VeraConfig", target_modules=["q_proj"], r=512, save_projection=False)
    folder = peft_folder(tmp_path / "a", model, config)
    store = open_store(tmp_path / "store", base=base_of(model), max_upload_bytes=300_000)
    for attempt in (lambda: put(store, folder, "a"), lambda: store.acquire_all([Wanted(files=adapter_files(folder))])):
        with pytest.raises(UnsupportedAdapter) as caught:
            attempt()
        assert caught.value.field == "save_projection"
    assert not places_on_disk(tmp_path / "store")
    assert not list((tmp_path / "store" / "adapters" / "packs").iterdir())
    store.close()
    with closing(open_store(tmp_path / "store", base=base_of(model))) as wider:
        put(wider, folder, "a")
        put(wider, folder, "b")
        assert len(places_on_disk(tmp_path / "store")) == 4  # the adapter, its layout and two matrices, once
        wider.delete("a")
        assert len(places_on_disk(tmp_path / "store")) == 4
        wider.delete("b")
        assert not places_on_disk(tmp_path / "store")


def test_an_upload_that_outgrows_memory_goes_to_the_disk(tmp_path: Path) -> None:
    with Upload(tmp_path, 100, in_memory_bytes=10) as upload:
        upload.write("adapter_config.json", b"12345")
        assert upload.quick(5)
        assert not upload.quick(6)
        assert not list(tmp_path.iterdir())
        upload.write("adapter_model.safetensors", b"123456")
        upload.write("adapter_model.safetensors", b"789")
        assert len(list(tmp_path.iterdir())) == 1
        assert upload.read() == AdapterFiles(b"12345", b"123456789")
    assert not list(tmp_path.iterdir())
