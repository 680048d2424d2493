"""Connections to the catalogue's file: one that writes, and readers that never wait for it.

Memory: SQLite keeps at most 32 MiB of pages for the writer and 2 MiB for each reader, of which at most eight stay open
while nothing is read; nothing is mapped. The write-ahead log is taken back into the file every 16 MiB, and cut off where a
large transaction or a long read made it longer than 64 MiB.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.failures import operation

_WRITER_KIB, _READER_KIB = 32 << 10, 2 << 10
_IDLE_READERS = 8
_BUSY_MS = 10_000
_CHECKPOINT_PAGES = 4000
_LARGEST_LOG = 64 << 20


def connect(path: Path, cache_kib: int = _WRITER_KIB) -> sqlite3.Connection:
    """A connection for any thread, one at a time; a commit on it is durable."""
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        settings = (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", f"cache_size=-{cache_kib}")
        for setting in (*settings, f"wal_autocheckpoint={_CHECKPOINT_PAGES}", f"journal_size_limit={_LARGEST_LOG}"):
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


class Connections:
    """Thread-safe. Takes over `writer`."""

    def __init__(self, path: Path, writer: sqlite3.Connection) -> None:
        self._path, self._log = path, path.with_name(f"{path.name}-wal")
        self._writer, self._writing = writer, threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._pooling = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Reads under way end as they would; their connections are closed after them."""
        with self._writing:
            with self._pooling:
                self._closed, idle = True, self._idle
                self._idle = []
            for db in idle:
                db.close()
            self._writer.close()

    @contextmanager
    def writing(self, what: str, *, keep: bool = True) -> Iterator[Transaction]:
        """One durable transaction; nothing of it stays if the block raises, or without `keep`. Raises `StoreFailed`."""
        with self._writing, operation(what):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                transaction = Transaction(self._writer)
                yield transaction
                transaction.write_counts()
                self._writer.execute("COMMIT" if keep else "ROLLBACK")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            # What is committed has happened, whatever becomes of this.
            with suppress(OSError, sqlite3.Error):
                self._bound_log()

    def _bound_log(self) -> None:
        if self._log.stat().st_size > _LARGEST_LOG:
            # Waits for nobody: what readers still need stays until one of the next writes.
            self._writer.execute("PRAGMA busy_timeout=0")
            try:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._writer.execute(f"PRAGMA busy_timeout={_BUSY_MS}")

    @contextmanager
    def reading(self, what: str = "read the catalogue") -> Iterator[sqlite3.Connection]:
        """A connection of the caller's own for the block. Raises `StoreFailed`."""
        with operation(what):
            db = self._borrow()
            try:
                yield db
            finally:
                self._give_back(db)

    @contextmanager
    def snapshot(self, what: str = "read the catalogue") -> Iterator[sqlite3.Connection]:
        """`reading` where all queries see the same state."""
        with self.reading(what) as db:
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("ROLLBACK")

    def _borrow(self) -> sqlite3.Connection:
        with self._pooling:
            if self._closed:
                raise sqlite3.ProgrammingError("the catalogue is closed")
            if self._idle:
                return self._idle.pop()
        db = connect(self._path, _READER_KIB)
        db.execute("PRAGMA query_only=ON")
        return db

    def _give_back(self, db: sqlite3.Connection) -> None:
        with self._pooling:
            if not self._closed and len(self._idle) < _IDLE_READERS:
                self._idle.append(db)
                return
        db.close()
