"""The file below the catalogue: durable, bounded, checked, copied."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from overtone.adapters.catalogue import Catalogue, connections
from overtone.adapters.paging import Listing
from overtone.errors import StoreFailed
from support.catalogues import digest, fill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite3"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(path)
    yield opened
    opened.close()


def test_a_write_waits_for_the_disk(catalogue: Catalogue) -> None:
    writer = catalogue._connections._writer
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# Forks a writer for every line that it reads, which says its process id and then "put" after each batch, until it is killed.
WRITER = """
import os, sys
from pathlib import Path
from overtone.adapters.catalogue import Catalogue
from support.catalogues import fill
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        catalogue = Catalogue(Path(sys.argv[1]))
        print(os.getpid(), flush=True)
        for batch in range(catalogue.count() // 10, 10**6):
            fill(catalogue, range(10 * batch, 10 * batch + 10))
            print("put", flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_what_was_answered_survives_a_kill(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    known = 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path], env=environment, stdin=-1, stdout=-1, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for answers in range(12):
            print(file=writer.stdin, flush=True)
            process = int(writer.stdout.readline())
            known += 10 * sum(writer.stdout.readline() == "put\n" for _ in range(answers))
            os.kill(process, signal.SIGKILL)
            known += 10 * sum(line == "put\n" for line in iter(writer.stdout.readline, "ended\n"))
            with closing(Catalogue(path)) as opened:
                assert opened.check() == []
                assert opened.count() % 10 == 0
                assert opened.count() >= known
                known = opened.count()
        writer.stdin.close()


def test_a_full_disk_changes_nothing(catalogue: Catalogue) -> None:
    fill(catalogue, range(100))
    before = catalogue.page(Listing(1000)).records
    writer = catalogue._connections._writer
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(StoreFailed, match="full"):
        fill(catalogue, range(100, 2000))
    assert catalogue.page(Listing(1000)).records == before
    assert catalogue.check() == []
    writer.execute("PRAGMA max_page_count=1000000")
    fill(catalogue, range(100, 2000))
    assert catalogue.count() == 2000


def test_the_log_is_bounded(catalogue: Catalogue, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a reader that kept it from being taken back."""
    monkeypatch.setattr(connections, "_LARGEST_LOG", 1 << 19)
    log = path.with_name(path.name + "-wal")
    with catalogue._connections.snapshot() as db:
        db.execute("SELECT count(*) FROM adapters").fetchone()
        for start in range(0, 8000, 2000):
            fill(catalogue, range(start, start + 2000))
        assert log.stat().st_size > 1 << 19
        assert db.execute("SELECT count(*) FROM adapters").fetchone() == (0,)
    for start in range(8000, 8010):
        fill(catalogue, range(start, start + 1))
        assert log.stat().st_size <= 1 << 19


def test_connections_of_readers_are_bounded(catalogue: Catalogue) -> None:
    fill(catalogue, range(3))
    meet, leave = threading.Barrier(21), threading.Event()

    def read() -> None:
        with catalogue._connections.reading():
            meet.wait()
            leave.wait()

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    meet.wait()
    assert catalogue.count() == 3
    leave.set()
    for thread in threads:
        thread.join()
    assert 1 <= len(catalogue._connections._idle) <= 8


def test_closing_waits_for_nobody_and_leaves_nothing_open(path: Path) -> None:
    catalogue = Catalogue(path)
    fill(catalogue, range(3))
    with catalogue._connections.reading() as db:
        catalogue.close()
        assert db.execute("SELECT count(*) FROM adapters").fetchone() == (3,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        db.execute("SELECT 1")
    for call in (catalogue.count, lambda: fill(catalogue, range(3))):
        with pytest.raises(StoreFailed, match="closed"):
            call()
    catalogue.close()


def test_a_copy_is_the_catalogue_of_that_moment(catalogue: Catalogue, tmp_path: Path) -> None:
    fill(catalogue, range(50))
    with pytest.raises(StoreFailed, match="No such file"):
        catalogue.backup(tmp_path / "nowhere" / "copy")
    catalogue.backup(tmp_path / "copy")
    fill(catalogue, range(50, 60))
    with pytest.raises(StoreFailed, match="exists"):
        catalogue.backup(tmp_path / "copy")
    with closing(Catalogue(tmp_path / "copy")) as copy:
        assert copy.check() == []
        assert copy.page(Listing(99)).records == catalogue.page(Listing(99)).records[:50]


DAMAGE = {
    "UPDATE blobs SET uses = 7 WHERE kind IS NULL": ("count", digest("layout"), "uses of a blob: 7 are noted, 10"),
    "UPDATE kinds SET uses = 1": ("count", "1", "uses of a kind: 1 are noted, 10"),
    "UPDATE counters SET adapters = 3": ("count", "", "adapters: 3 are noted, 10"),
    "UPDATE counters SET versions = 3": ("count", "", "versions: 3 are noted, 10"),
    "UPDATE packs SET live_count = 3 WHERE pack = 1": ("count", "1", "live blobs of a pack: 3 are noted, 11"),
    "UPDATE packs SET live_bytes = 3 WHERE pack = 1": ("count", "1", "live bytes of a pack: 3 are noted, 1100"),
    "UPDATE packs SET size = 3 WHERE pack = 1": ("count", "1", "size of a pack: 3 are noted"),
    "UPDATE blobs SET pack = 9 WHERE kind IS NULL": ("reference", "blobs", "a row of packs"),
    "DELETE FROM adapter_versions WHERE adapter = 4": ("facts", "a00003", "current version is not among"),
    "UPDATE adapters SET previous = 3 WHERE adapter = 4": ("facts", "a00003", "version from before"),
    "UPDATE adapters SET size_bytes = 1 WHERE adapter = 4": ("facts", "a00003", "size or class"),
    "UPDATE adapters SET create_time = 1 WHERE adapter = 4": ("facts", "a00003", "created before an older one"),
    "DELETE FROM labels WHERE id = 'a00003'": ("facts", "a00003", "does not have its labels"),
    "INSERT INTO labels VALUES ('k', 'x', 'a00003')": ("facts", "a00003", "labels that it does not have"),
    "DELETE FROM adapters WHERE adapter = 4": ("reference", "adapter_versions", "a row of adapters"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_check_finds(catalogue: Catalogue, damage: str) -> None:
    fill(catalogue, range(10))
    steps: list[tuple[int, int]] = []
    assert catalogue.check(lambda done, total: steps.append((done, total))) == []
    assert [done for done, _ in steps] == list(range(steps[0][1] + 1))
    with catalogue._connections.writing("damage the catalogue") as transaction:
        transaction.db.execute(damage)
    kind, subject, what = DAMAGE[damage]
    found = catalogue.check()
    assert any(one.kind == kind and one.subject.startswith(subject) and what in one.what for one in found), found


def test_a_check_finds_broken_pages(path: Path) -> None:
    with closing(Catalogue(path)) as opened:
        fill(opened, range(2000))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = random.Random(1).randbytes(4096)
    path.write_bytes(data)
    with closing(Catalogue(path)) as opened:
        assert any(problem.kind == "file" for problem in opened.check())
