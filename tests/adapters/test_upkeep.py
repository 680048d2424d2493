"""What the store does by itself: it goes on after a failure, stops when it is told to, and compacts what it counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from overtone.adapters import disk
from overtone.adapters.upkeep import Upkeep
from support.adapters import open_store, put
from support.packs import Store

Make = Callable[[int], Path]


def test_a_task_that_fails_is_called_again(caplog: pytest.LogCaptureFixture) -> None:
    calls, again = [0], threading.Event()

    def task() -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(5, "Input/output error")
        again.set()

    upkeep = Upkeep([task], 0.001)
    assert again.wait(20)
    upkeep.close()
    assert "upkeep failed" in caplog.text


def test_a_compaction_stops_before_the_next_pack(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=1000)
    blobs = store.put_all(*[100] * 40)
    store.release(list(blobs)[::2])
    asked: list[bool] = []
    compaction = store.blobs.compact(1.0, stop=lambda: asked.append(True) or len(asked) > 3)  # type: ignore[func-returns-value]
    assert compaction.packs == 1
    store.assert_sound({digest: blobs[digest] for digest in list(blobs)[1::2]})
    assert store.blobs.compact(1.0).packs > 1
    store.assert_whole({digest: blobs[digest] for digest in list(blobs)[1::2]})
    store.close()


def test_closing_ends_a_compaction(tmp_path: Path, loca: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtone.adapters.store._UPKEEP_S", 0.001)
    with closing(open_store(tmp_path)) as store:
        asked = threading.Event()

        def compact(*arguments: object, stop: Callable[[], bool]) -> None:
            asked.set()
            while not stop():
                pass

        monkeypatch.setattr(store._blobs, "compact", compact)
        monkeypatch.setattr(disk, "_TIDY_BYTES", -1)
        monkeypatch.setattr(disk, "_TIDY_BELOW", 1.0)
        put(store, loca(1), "a")
        put(store, loca(2), "b")
        store.delete("a")
        assert asked.wait(20)


@pytest.mark.parametrize("keep", [2, 3, 4, 5, 6, 7, 8])
def test_what_is_counted_is_what_is_compacted(
    tmp_path: Path, loca: Make, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(disk, "_TIDY_BYTES", 0)
    with closing(open_store(tmp_path, pack_bytes=1 << 12)) as store:
        for seed in range(8):
            put(store, loca(seed), f"a{seed}")
        for seed in range(keep, 8):
            store.delete(f"a{seed}")
        before = store._blobs.stats()
        store._disk.tidy(lambda: False)
        after = store._blobs.stats()
        if before.garbage_bytes * 3 > before.pack_bytes:
            assert after.garbage_bytes < before.garbage_bytes
        else:
            assert after == before
        store._disk.tidy(lambda: False)
        assert store._blobs.stats() == after  # not again and again in vain
