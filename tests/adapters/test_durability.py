"""What was acknowledged survives; what was not leaves nothing; what is broken is never served."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from overtone.adapters import AdapterStore
from overtone.adapters.upload import Upload
from overtone.errors import BaseModelMismatch, ConfigError, StoreCorrupted, StoreFailed
from support.adapters import BASE, SHAPES, make_loca_folder, open_store, put

Make = Callable[[int], Path]

# Imports once, then forks a writer for every line that it reads: "K" kills itself at its Kth durable step. A writer reports
# each acknowledgement, and each deletion before it asks for it, because that may have happened without its answer.
WRITER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from support.adapters import open_store, put
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
    os.fsync, Path.replace, Path.unlink = step(os.fsync), step(Path.replace), step(Path.unlink)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        store, number = open_store(store_root), int(line)
        arm(number)
        for i, folder in enumerate(folders):
            say("have", f"id{i}-{number}", put(store, folder, f"id{i}-{number}").digest)
            put(store, folders[0], "swapped")
            say("may-delete", f"id{i}-{number}") if i == 1 else None
            store.delete(f"id{i}-{number}") if i == 1 else None
            say("have", "swapped", put(store, folder, "swapped").digest)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    say("killed" if killed else "ended")
"""


def test_kill_nine_at_every_durable_step(tmp_path: Path, loca: Make) -> None:
    root, folders = tmp_path / "store", [str(loca(seed)) for seed in range(3)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(root), *folders]
    expected: dict[str, str] = {}
    deleted: set[str] = set()
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for step in range(24):
            writer.stdin.write(f"{step}\n")
            while (words := writer.stdout.readline().split()) != ["killed"]:
                if words[0] == "have":
                    expected[words[1]] = words[2]
                else:
                    deleted.add(words[1])
            check_whole(root, expected, deleted)
        writer.stdin.close()
    assert len(expected) > 24


def check_whole(root: Path, expected: dict[str, str], deleted: set[str]) -> None:
    store = open_store(root)
    records = {record.id: record for record in store.list(1000, "")[0]}
    for adapter_id, digest in expected.items():
        if adapter_id in deleted and adapter_id not in records:
            continue
        assert digest in records[adapter_id].versions
    for record in records.values():
        for digest in record.versions:
            with store.acquire(f"{record.id}@{digest}") as lease:
                assert lease.adapter.deltas.keys() == SHAPES.keys()
    assert not list((root / "adapters" / "tmp").iterdir())
    on_disk = {path.stem for path in (root / "adapters" / "blobs").rglob("*.safetensors")}
    assert on_disk == {digest for record in records.values() for digest in record.versions}
    store.close()


def test_restart(tmp_path: Path, loca: Make) -> None:
    store = open_store(tmp_path)
    records = [put(store, loca(1), "a", pinned=True, labels={"k": "v"}), put(store, loca(2), "b")]
    store.close()
    (tmp_path / "adapters" / "tmp" / "left").mkdir()
    (tmp_path / "adapters" / "tmp" / "left" / "over").write_text("x")
    stray = tmp_path / "adapters" / "blobs" / "sha256" / "00" / f"{'0' * 64}.safetensors"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("half")
    store = open_store(tmp_path)
    assert store.list(0, "")[0] == records
    assert [store.residency_state(record.digest) for record in records] == ["resident", "stored"]
    assert not stray.exists()
    assert not list((tmp_path / "adapters" / "tmp").iterdir())
    store.close()


def blob_path(store: AdapterStore, digest: str) -> Path:
    return store._config.root / "adapters" / "blobs" / "sha256" / digest[:2] / f"{digest}.safetensors"


def test_a_broken_blob_is_set_aside_and_an_upload_heals_it(store: AdapterStore, loca: Make) -> None:
    record = put(store, loca(1), "a")
    path = blob_path(store, record.digest)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(StoreCorrupted, match=record.digest[:12]):
            store.acquire("a")
    assert not path.exists()
    (aside,) = (store._config.root / "adapters" / "quarantine").iterdir()
    assert aside.read_bytes() == damaged
    assert store.stats().leased_count == 0
    assert put(store, loca(1), "a") == record
    store.acquire("a").release()


def test_a_broken_pinned_adapter_does_not_stop_the_start(
    tmp_path: Path, loca: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    broken, sound = put(store, loca(1), "a", pinned=True), put(store, loca(2), "b", pinned=True)
    store.close()
    blob_path(store, broken.digest).write_bytes(b"x")
    store = open_store(tmp_path)
    assert broken.digest[:12] in caplog.text
    assert store.residency_state(sound.digest) == "resident"
    store.close()
    store = open_store(tmp_path, base=replace(BASE, modules={}))
    with pytest.raises(BaseModelMismatch):
        store.acquire("b")
    store.close()


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_refuses(
    store: AdapterStore, loca: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    put(store, loca(1), "a")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "/some/secret/path")

    folder = loca(2)
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, full)
        with pytest.raises(StoreFailed, match="No space left on device") as caught:
            put(store, folder, "b") if call != "open" else Upload(tmp_path, 100, 0).write("adapter_config.json", b"{}")
    assert "secret" not in str(caught.value)
    assert [record.id for record in store.list(0, "")[0]] == ["a"]
    assert len(list((store._config.root / "adapters" / "blobs").rglob("*.safetensors"))) == 1
    assert put(store, folder, "b").id == "b"


def test_a_catalogue_that_refuses(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a")
    store._catalogue._writer.execute("PRAGMA query_only=ON")
    for call in (lambda: put(store, loca(2), "b"), lambda: store.delete("a"), lambda: store.update("a", pinned=True)):
        with pytest.raises(StoreFailed):
            call()
    store._catalogue._writer.execute("PRAGMA query_only=OFF")
    assert [record.id for record in store.list(0, "")[0]] == ["a"]
    assert len(list((store._config.root / "adapters" / "blobs").rglob("*.safetensors"))) == 1


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
    assert not open_store(tmp_path)._catalogue.digests()
