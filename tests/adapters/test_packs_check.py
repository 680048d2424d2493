"""What a look at the files finds, and what it may remove."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from overtone.adapters.packs import OWN_FILE, Place, Problem
from overtone.adapters.packs import check as check_module
from overtone.errors import StoreFailed
from support.packs import Disk, Store, blobs_of, small_own_files


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with small_own_files(1000):
        opened = Store(tmp_path, pack_bytes=1000)
        yield opened
        opened.close()


def found(store: Store, *, deep: bool = False) -> list[tuple[str, str, int]]:
    return [(problem.kind, problem.digest, problem.pack) for problem in store.blobs.check(deep=deep)]


def test_progress_counts_blobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_PAGE", 3)
    store.put_all(*[100] * 14, *[1200] * 5)
    steps: list[tuple[int, int]] = []
    assert store.blobs.check(progress=lambda done, total: steps.append((done, total))) == []
    assert steps == [(6, 14), (12, 14), (14, 14), (17, 17), (19, 19)]


def test_contents_are_read_when_it_looks_deep(store: Store) -> None:
    first, second, large = store.put_all(100, 101, 1500)
    store.damage(first)
    store.damage(second, byte=-40)
    store.damage(large)
    assert found(store) == []
    expected = {("bad_digest", first, 1), ("bad_header", second, 1), ("bad_digest", large, OWN_FILE)}
    assert set(found(store, deep=True)) == expected
    # It looks, and sets nothing aside: that is for who needs the blob.
    assert store.set_aside() == []


def test_files_that_are_not_as_the_index_says(store: Store) -> None:
    first, second, third, large, other = store.put_all(100, 101, 102, 1500, 1501)
    places = store.index.places
    store.index.commit({second: Place(1, places[second].offset - 8, 101), third: Place(1, places[third].offset, 5000)})
    store.folder.own(large).unlink()
    store.folder.own(other).write_bytes(b"short")
    assert set(found(store)) == {
        ("overlap", second, 1),
        ("out_of_range", third, 1),
        ("missing_file", large, OWN_FILE),
        ("bad_digest", other, OWN_FILE),
    }
    store.release([second, third, large, other])
    store.folder.pack(1).unlink()
    assert found(store) == [("missing_pack", "", 1)]
    store.release([first])
    assert found(store) == []


def test_garbage_is_removed_when_asked(store: Store) -> None:
    blobs = store.put_all(100, 1500)
    unknown = "ab" * 32
    store.folder.own(unknown).parent.mkdir(exist_ok=True)
    store.folder.own(unknown).write_bytes(b"x")
    store.folder.pack(9).write_bytes(b"x")
    expected = [("unknown_pack", "", 9), ("unreferenced_file", unknown, OWN_FILE)]
    assert found(store) == expected
    problems = store.blobs.check(repair=True)
    assert all(problem.garbage for problem in problems)
    assert [(p.kind, p.digest, p.pack) for p in problems] == expected
    store.assert_whole(blobs)


def test_what_is_not_ours_is_shown_and_left(store: Store) -> None:
    strays = ["packs/notes.txt", "packs/1.pack", "blobs/sha256/README", f"blobs/sha256/00/{'ab' * 32}.safetensors"]
    for name in strays:
        (store.folder.root / name).parent.mkdir(exist_ok=True)
        (store.folder.root / name).write_text("x")
    for _ in range(2):
        problems = store.blobs.check(repair=True)
        assert {problem.kind for problem in problems} == {"stray_file"}
        assert {problem.what.split()[0] for problem in problems} == set(strays)
        assert not any(problem.garbage for problem in problems)


def test_what_is_being_stored_is_no_garbage(store: Store) -> None:
    blobs = blobs_of(*[100] * 12, 1500)
    with store.blobs.store(blobs) as places:
        assert store.blobs.check(repair=True) == []
        store.index.commit(places)
    store.assert_whole(blobs)


def test_what_leaves_meanwhile_is_no_problem(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of the index is older than the look at the file."""
    small, large = store.put_all(100, 1500)
    real = store.index.own_files

    def own_files(after: str, limit: int) -> list[tuple[str, Place]]:
        listed = list(real(after, limit))
        store.release([large])
        return listed

    monkeypatch.setattr(store.index, "own_files", own_files)
    assert found(store) == []
    assert list(store.index.places) == [small]


def test_a_disk_that_refuses(store: Store) -> None:
    store.put_all(1500)
    with Disk() as faults:
        faults.refuse("read_file", errno=5)
        with pytest.raises(StoreFailed):
            store.blobs.check(deep=True)


def test_a_problem_is_a_value() -> None:
    assert Problem("bad_digest", "a", 1, "x") == Problem("bad_digest", "a", 1, "x")
    assert not Problem("bad_digest", "a", 1, "x").garbage
    assert Problem("unknown_pack", "", 1, "x").garbage


def test_a_pack_that_grows_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_all(*[100] * 3)
    real = store.index.live_in

    def live_in(pack: int, after: int, limit: int) -> object:
        if after < 0:
            store.put_all(*[100] * 3, seed=1)
        return real(pack, after, limit)

    monkeypatch.setattr(store.index, "live_in", live_in)
    assert store.blobs.check(deep=True) == []
