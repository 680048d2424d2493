"""What was acknowledged survives; what was not leaves nothing; what is broken is never served."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from overtone.adapters import AdapterStore
from overtone.adapters.operations import ImportItem
from overtone.adapters.upload import Upload
from overtone.errors import BaseModelMismatch, ConfigError, StoreCorrupted, StoreFailed
from support.adapters import BASE, SHAPES, adapter_files, make_loca_folder, open_store, put
from support.packs import Disk, small_own_files
from support.stored import blob_file, damage, read_blob, versions_on_disk

Make = Callable[[int], Path]

# Imports once, then forks a writer for every line that it reads: "K" kills itself at its Kth durable step, in a store of its
# own. A writer reports each acknowledgement, and each deletion before it asks for it, because that may have happened without
# its answer.
WRITER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.operations import ImportItem
from overtone.adapters.packs import blobs, disk
from support.adapters import adapter_files, open_store, put
blobs.OWN_FILE_BYTES = 1000  # layouts are files of their own, versions are in packs
store_root, *folders = map(Path, sys.argv[1:])

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())

def arm(steps):
    left = [steps]
    def step(call):
        def counted(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **kwargs)
        return counted
    for name in ("create", "write_all", "sync", "sync_folder", "truncate", "replace", "unlink"):
        setattr(disk, name, step(getattr(disk, name)))
    Transaction.write_counts = step(Transaction.write_counts)  # the last thing before a commit

def work(store):
    for i, folder in enumerate(folders):
        say("have", f"id{i}", put(store, folder, f"id{i}").digest)
        for result in store.import_many([ImportItem(name, adapter_files(folders[0])) for name in ("swapped", "other")]):
            say("have", result.adapter_id, result.digest)
        say("may-delete", f"id{i}") if i == 1 else None
        store.delete(f"id{i}") if i == 1 else None
        store.compact(below=1.0)
        say("have", "swapped", put(store, folder, "swapped").digest)
    store.activate("swapped")

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        arm(int(line))
        work(open_store(store_root / line.strip(), pack_bytes=1 << 12))
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    say("killed" if killed else "ended")
"""


def test_kill_nine_at_every_durable_step(tmp_path: Path, loca: Make) -> None:
    folders = [str(loca(seed)) for seed in range(3)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path), *folders]
    had = 0
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for step in count():
            expected: dict[str, str] = {}
            deleted: set[str] = set()
            writer.stdin.write(f"{step}\n")
            while (words := writer.stdout.readline().split())[0] not in ("killed", "ended"):
                if words[0] == "have":
                    expected[words[1]] = words[2]
                else:
                    deleted.add(words[1])
            check_whole(tmp_path / str(step), expected, deleted)
            had += len(expected)
            if words == ["ended"]:
                break
        writer.stdin.close()
    assert step > 40
    assert had > step


def check_whole(root: Path, expected: dict[str, str], deleted: set[str]) -> None:
    store = open_store(root)
    assert not list((root / "adapters" / "tmp").iterdir())
    assert not store.check(deep=True)
    records = {record.id: record for record in store.list(1000, "")[0]}
    for adapter_id, digest in expected.items():
        if adapter_id in deleted and adapter_id not in records:
            continue
        assert digest in records[adapter_id].versions
    for record in records.values():
        for digest in record.versions:
            with store.acquire(f"{record.id}@{digest}") as lease:
                assert lease.adapter.deltas.keys() == SHAPES.keys()
    assert set(versions_on_disk(root)) == {digest for record in records.values() for digest in record.versions}
    store.close()


def test_restart(tmp_path: Path, loca: Make) -> None:
    """What a crash may leave is gone after it."""
    store = open_store(tmp_path)
    records = [put(store, loca(1), "a", pinned=True, labels={"k": "v"}), put(store, loca(2), "b")]
    store.close()
    root = tmp_path / "adapters"
    (root / "tmp" / "left").mkdir()
    (root / "tmp" / "left" / "over").write_text("x")
    (root / "tmp" / "left.intent").write_text("0" * 64)
    stray, unknown = root / "blobs" / "sha256" / "00" / f"{'0' * 64}.safetensors", root / "packs" / "00000007.pack"
    stray.parent.mkdir()
    for path in (stray, unknown):
        path.write_text("half")
    (pack,) = {blob_file(tmp_path, record.digest)[0] for record in records}
    size = pack.stat().st_size
    with pack.open("ab") as file:
        file.write(b"half")
    store = open_store(tmp_path)
    assert store.list(0, "")[0] == records
    assert [store.residency_state(record.digest) for record in records] == ["resident", "stored"]
    assert not stray.exists()
    assert not unknown.exists()
    assert pack.stat().st_size == size
    assert not list((root / "tmp").iterdir())
    assert not store.check(deep=True)
    store.close()


def test_what_no_crash_leaves_is_not_touched_until_somebody_asks(tmp_path: Path, loca: Make) -> None:
    """A start takes no time that grows with the store, so it does not look for files that nothing names."""
    with closing(open_store(tmp_path)) as store:
        put(store, loca(1), "a")
    stray = tmp_path / "adapters" / "blobs" / "sha256" / "00" / f"{'0' * 64}.safetensors"
    stray.parent.mkdir()
    stray.write_text("half")
    with closing(open_store(tmp_path)) as store:
        assert [problem.kind for problem in store.check()] == ["unreferenced_file"]
        assert stray.exists()
        assert [problem.kind for problem in store.check(repair=True)] == ["unreferenced_file"]
        assert not stray.exists()
        assert not store.check(deep=True)
        store.acquire("a").release()


def test_a_broken_blob_is_set_aside_and_an_upload_heals_it(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path)) as store:
        record = put(store, loca(1), "a")
        same = put(store, loca(1), "b")
    damage(tmp_path, record.digest)
    damaged = read_blob(tmp_path, record.digest)
    with closing(open_store(tmp_path)) as store:
        for _ in range(2):
            with pytest.raises(StoreCorrupted, match=record.digest[:12]) as caught:
                store.acquire("a")
            assert caught.value.metadata["digest"] == record.digest
            with pytest.raises(StoreCorrupted):
                store.acquire("b")
        assert {r.id: r.state for r in store.list(0)[0]} == {"a": "quarantined", "b": "quarantined"}
        (aside,) = (tmp_path / "adapters" / "quarantine").iterdir()
        assert aside.read_bytes() == damaged
        assert store.stats().leased_count == 0
        assert [problem.digest for problem in store.check(deep=True)] == [record.digest]
        assert put(store, loca(1), "a") == record
        assert store.get("b") == same
        store.acquire("b").release()
        assert not store.check(deep=True)
    with closing(open_store(tmp_path)) as store:
        store.acquire("a").release()


def test_what_a_broken_shared_blob_took_comes_back_with_it(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path)) as store:
        records = [put(store, loca(seed), f"a{seed}") for seed in range(3)]
        (layout,) = set.intersection(*(set(store._catalogue.shared_by(r.digest)) for r in records))
    damage(tmp_path, layout)
    with closing(open_store(tmp_path)) as store:
        with pytest.raises(StoreCorrupted) as caught:
            store.acquire("a0")
        assert caught.value.metadata["digest"] == layout
        assert {r.state for r in store.list(0)[0]} == {"quarantined"}
        with pytest.raises(StoreCorrupted):
            store.acquire("a1")
        put(store, loca(2), "a2")
        assert {r.state for r in store.list(0)[0]} == {"ready"}
        for seed in range(3):
            store.acquire(f"a{seed}").release()
        assert not store.check(deep=True)


def test_a_check_sets_aside_and_lifts(tmp_path: Path, loca: Make) -> None:
    with closing(open_store(tmp_path)) as store:
        records = [put(store, loca(seed), f"a{seed}") for seed in range(3)]
        (layout,) = set.intersection(*(set(store._catalogue.shared_by(r.digest)) for r in records))
    for broken, states in ((records[0].digest, {"quarantined", "ready"}), (layout, {"quarantined"})):
        damage(tmp_path, broken)
        with closing(open_store(tmp_path)) as store:
            assert [problem.digest for problem in store.check(deep=True)] == [broken]
            assert {r.state for r in store.list(0)[0]} == states
            with pytest.raises(StoreCorrupted):
                store.acquire("a0")
        damage(tmp_path, broken)  # as it was
        with closing(open_store(tmp_path)) as store:
            assert not store.check(deep=True)
            assert {r.state for r in store.list(0)[0]} == {"ready"}
            store.acquire("a0").release()


def test_a_broken_pinned_adapter_does_not_stop_the_start(
    tmp_path: Path, loca: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    broken, sound = put(store, loca(1), "a", pinned=True), put(store, loca(2), "b", pinned=True)
    store.close()
    damage(tmp_path, broken.digest)
    store = open_store(tmp_path)
    assert broken.digest[:12] in caplog.text
    assert store.residency_state(sound.digest) == "resident"
    assert [record.state for record in store.list(0)[0]] == ["quarantined", "ready"]
    store.close()
    store = open_store(tmp_path, base=replace(BASE, modules={}))
    with pytest.raises(BaseModelMismatch):
        store.acquire("b")
    assert store.get("b").state == "ready"
    store.close()


@pytest.mark.parametrize("call", ["create", "write_all", "sync", "sync_folder", "replace"])
@pytest.mark.parametrize("many", [False, True])
def test_a_disk_that_refuses(store: AdapterStore, loca: Make, tmp_path: Path, call: str, many: bool) -> None:
    """Nothing has changed, and the next one succeeds. What refuses is asked for by layouts, which are files here."""
    put(store, loca(1), "a")
    files = adapter_files(make_loca_folder(tmp_path / "other", SHAPES, n=13, seed=2))
    store._blobs.compact()

    def commit() -> None:
        if many:
            store.import_many([ImportItem("b", files), ImportItem("c", files)])
        else:
            store.load_folder("other", "b")

    with small_own_files(1000):
        with Disk() as disk:
            disk.refuse(call)
            with pytest.raises(StoreFailed, match="No space left on device") as caught:
                commit()
            assert disk.calls
        assert "secret" not in str(caught.value)
        assert [record.id for record in store.list(0, "")[0]] == ["a"]
        assert len(versions_on_disk(store._config.root)) == 1
        store.acquire("a").release()
        commit()
    assert store.get("b").digest in versions_on_disk(store._config.root)
    assert not store.check(deep=True)


def test_an_upload_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "/some/secret/path")

    monkeypatch.setattr(Path, "open", full)
    with Upload(tmp_path, 100, 0) as upload, pytest.raises(StoreFailed, match="No space left on device") as caught:
        upload.write("adapter_config.json", b"{}")
    assert "secret" not in str(caught.value)


def test_a_catalogue_that_refuses(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    before = store.get("a")
    writer = store._catalogue._connections._writer
    writer.execute("PRAGMA query_only=ON")
    calls: list[Callable[[], object]] = [
        lambda: put(store, loca(2), "b"),
        lambda: store.import_many([ImportItem("b", adapter_files(loca(2)))]),
        lambda: store.delete("a"),
        lambda: store.update("a", pinned=True),
    ]
    for call in calls:
        with pytest.raises(StoreFailed):
            call()
    writer.execute("PRAGMA query_only=OFF")
    assert store.list(0, "")[0] == [before]
    assert versions_on_disk(store._config.root) == [before.digest]
    store.acquire("a").release()
    put(store, loca(2), "b")
    assert not store.check(deep=True)


def test_a_newer_or_foreign_catalogue_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    path = tmp_path / "adapters" / "catalogue.sqlite3"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ConfigError, match="newer"):
        open_store(tmp_path)
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreFailed):
        open_store(tmp_path)


def test_leases_outlive_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, make_loca_folder(tmp_path / "a", SHAPES, n=4, seed=1), "a")
    lease = store.acquire("a")
    store.delete("a")
    store.close()
    lease.release()
    assert open_store(tmp_path)._catalogue.counts().blobs == 0
