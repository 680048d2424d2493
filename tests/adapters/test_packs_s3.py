"""The same against a server that speaks S3, on a socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from overtone.adapters.packs import OWN_FILE_BYTES, Remote
from overtone.adapters.packs.place import record_bytes
from overtone.errors import StoreFailed
from support.packs import Store
from support.remotes import s3_server

RECORD = record_bytes(100)


@pytest.fixture
def server() -> Iterator[ThreadedMotoServer]:
    with s3_server("adapters") as running:
        yield running


def test_a_life(tmp_path: Path, server: ThreadedMotoServer) -> None:
    options = {"pack_bytes": 10 * RECORD, "disk_bytes": 20 * RECORD}
    store = Store(tmp_path, Remote("s3://adapters/of/mine"), **options)
    blobs = store.put_all(*[100] * 35, OWN_FILE_BYTES)
    store.blobs.upload()
    stats = store.blobs.stats()
    assert stats.remote is not None
    assert (stats.packs, stats.evicted_packs, stats.remote.uploads, stats.remote.evictions) == (4, 2, 5, 3)
    assert store.own_files() == set()
    store.reopen()
    store.assert_whole(blobs)
    store.blobs.upload()
    store.release(list(blobs)[::2])
    store.blobs.compact(0.9)
    store.blobs.upload()
    left = dict(list(blobs.items())[1::2])
    store.assert_whole(left)
    store.release(left)
    store.blobs.compact()
    store.blobs.upload()
    (mark,) = Remote("s3://adapters").names("of")
    assert mark == f"of/mine/{store.blobs._parts.ledger.mark_name}"
    store.close()


def test_an_object_of_several_parts(server: ThreadedMotoServer) -> None:
    remote, chunk = Remote("s3://adapters"), bytes(range(256)) * 4096
    stored = remote.put("a/b", [chunk] * 9)
    assert stored.size == 9 << 20
    assert stored.etag.endswith('-2"')
    assert remote.head("a/b") == stored
    assert remote.get("a/b", (8 << 20) - 3, 10) == chunk[-3:] + chunk[:7]
    assert remote.get("a/b", (9 << 20) - 3, 10) == chunk[-3:]
    assert list(remote.names("a")) == ["a/b"]
    remote.delete("a/b")
    remote.delete("a/b")
    assert remote.head("a/b") is None
    assert remote.get("a/b", 0, 1) is None


def test_a_server_that_is_gone(tmp_path: Path, server: ThreadedMotoServer) -> None:
    store = Store(tmp_path, Remote("s3://adapters"), pack_bytes=10 * RECORD, disk_bytes=1)
    blobs = store.put_all(*[100] * 12)
    store.blobs.upload()
    server.stop()
    with pytest.raises(StoreFailed, match="object storage") as caught:
        store.blobs.read(next(iter(blobs)))
    assert caught.value.retry_after_s == 1.0
    assert "127.0.0.1" not in str(caught.value)
    last = list(blobs)[-1]
    assert store.blobs.read(last) == blobs[last]
    store.close()


def test_a_bucket_that_is_not_there(server: ThreadedMotoServer) -> None:
    remote = Remote("s3://elsewhere")
    with pytest.raises(StoreFailed):
        remote.put("a", [b"x"])
    with pytest.raises(StoreFailed):
        list(remote.names("a"))


def test_the_wrong_bucket(tmp_path: Path, server: ThreadedMotoServer) -> None:
    """Whether it exists or not: nothing is lost, and nothing is said to be."""
    store = Store(tmp_path, Remote("s3://adapters"), pack_bytes=10 * RECORD, disk_bytes=1)
    blobs = store.put_all(*[100] * 12)
    store.blobs.upload()
    store.close()
    for url in ("s3://elsewhere", "s3://adapters/elsewhere"):
        store.remote = Remote(url)
        store.open()
        with pytest.raises(StoreFailed):
            store.blobs.read(next(iter(blobs)))
        store.close()
    store.remote = Remote("s3://adapters")
    store.open()
    store.assert_whole(blobs)
    store.close()
