"""All that is asked of the catalogue, and what happens together.

A write has happened when its method returns (write-ahead log with synchronous=FULL), and nothing of it if it raises.
Readers wait for no writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from overtone.adapters.catalogue import changing, rows
from overtone.adapters.catalogue.backup import backup
from overtone.adapters.catalogue.blob_index import BlobIndex
from overtone.adapters.catalogue.checking import check
from overtone.adapters.catalogue.listing import page
from overtone.adapters.catalogue.migration import Progress
from overtone.adapters.catalogue.opening import open_catalogue
from overtone.adapters.catalogue.putting import put_all
from overtone.adapters.catalogue.types import Counts, Entry, Freed, Options, Outcome, Problem, Resolved
from overtone.adapters.packs import OWN_FILE, Place
from overtone.adapters.paging import Listing, Page
from overtone.adapters.records import AdapterRecord
from overtone.errors import AdapterExists


def _untold(done: int, total: int) -> None:
    pass


class Catalogue(BlobIndex):
    """Thread-safe. Raises `StoreFailed` where SQLite fails, and changes nothing then. Opening takes no time that grows with
    the adapters, but for a catalogue that an older Overtone wrote, of which `progress` is told (done, total) steps."""

    def __init__(self, path: Path, progress: Progress = _untold) -> None:
        super().__init__(open_catalogue(path, progress))

    def close(self) -> None:
        self._connections.close()

    def put(self, entry: Entry, places: Mapping[str, Place]) -> AdapterRecord:
        """Makes a version the current one of an id. Equal content and options change nothing, not even the etag.

        places: where the blobs are that were stored for it; those that are known already need none. With `validate_only` the
        same answer, but nothing is kept or needs a place. Raises `AdapterExists` under `create_only`.
        """
        options = entry.options
        if options.validate_only:
            places = dict.fromkeys(
                (entry.version.digest, *entry.version.shared), Place(OWN_FILE, 0, entry.version.size_bytes)
            )
        with self._connections.writing("record an adapter", keep=not options.validate_only) as transaction:
            (outcome,) = put_all(transaction, [entry], places)
            if outcome.outcome == "exists":
                raise already_exists(entry.adapter_id)
            return rows.record(transaction.db, entry.adapter_id)

    def put_many(self, entries: Sequence[Entry], places: Mapping[str, Place]) -> list[Outcome]:
        """`put` of each, all in one transaction. An adapter that exists under `create_only` is an outcome, not an error."""
        assert not any(entry.options.validate_only for entry in entries)
        with self._connections.writing("record adapters") as transaction:
            return put_all(transaction, entries, places)

    def update(
        self, adapter_id: str, *, pinned: bool | None, labels: Mapping[str, str] | None, etag: str = ""
    ) -> AdapterRecord:
        """Changes the options that are not None. Raises `AdapterNotFound`, `EtagMismatch`."""
        with self._connections.writing("update an adapter") as transaction:
            old = rows.existing(transaction.db, adapter_id, etag)
            changing.change(transaction, old, Options(pinned=pinned, labels=labels), transaction.now())
            return rows.record(transaction.db, adapter_id)

    def activate(self, adapter_id: str, prefix: str = "", etag: str = "") -> AdapterRecord:
        """Makes the kept version whose digest begins with `prefix` the current one; "": the one that was before it.

        The order of the versions stays as it is. Raises `AdapterNotFound`, `InvalidRequest`, `EtagMismatch`.
        """
        with self._connections.writing("activate a version") as transaction:
            changing.activate(transaction, rows.existing(transaction.db, adapter_id, etag), prefix)
            return rows.record(transaction.db, adapter_id)

    def delete(self, adapter_id: str, etag: str = "") -> Freed:
        """Forgets an id. Raises `AdapterNotFound`, `EtagMismatch`."""
        with self._connections.writing("delete an adapter") as transaction:
            return changing.delete(transaction, rows.existing(transaction.db, adapter_id, etag))

    def prune_many(self, adapter_ids: Iterable[str], keep: int) -> Freed:
        """Forgets the versions of each that are older than its newest `keep`, but for the current one; ids that do not exist
        are passed over."""
        with self._connections.writing("forget versions") as transaction:
            adapters = rows.stored(transaction.db, adapter_ids).values()
            return Freed(tuple(one for old in adapters for one in changing.prune(transaction, old, keep).versions))

    def touch(self, used: Mapping[str, int]) -> None:
        """When adapters were last used, in microseconds since 1970; no change of them in any other sense. Those that are not
        there any more are passed over, and so are times before the known one."""
        query = "UPDATE adapters SET used_time = ?2 WHERE id = ?1 AND used_time < ?2"
        with self._connections.writing("note the use of adapters") as transaction:
            transaction.db.executemany(query, sorted(used.items()))

    def get(self, adapter_id: str, etag: str = "") -> AdapterRecord:
        """Raises `AdapterNotFound`, and `EtagMismatch` if an etag is given that is not the current one."""
        with self._connections.reading() as db:
            return rows.record(db, adapter_id, etag)

    def find(self, adapter_id: str) -> AdapterRecord | None:
        with self._connections.reading() as db:
            return rows.record(db, adapter_id) if rows.stored(db, [adapter_id]) else None

    def exists(self, adapter_id: str) -> bool:
        with self._connections.reading() as db:
            return bool(rows.stored(db, [adapter_id]))

    def resolve(self, adapter_id: str, prefix: str = "") -> Resolved:
        """The current version, or the one whose digest begins with `prefix`. Raises `AdapterNotFound`, `InvalidRequest`."""
        with self._connections.reading() as db:
            return rows.resolve(db, adapter_id, prefix)

    def target(self, adapter_id: str, prefix: str = "") -> Resolved:
        """The version that `activate` would make the current one. Raises `AdapterNotFound`, `InvalidRequest`."""
        with self._connections.reading() as db:
            return rows.resolve(db, adapter_id, prefix) if prefix else rows.previous(db, adapter_id)

    def page(self, listing: Listing) -> Page:
        """Raises `InvalidRequest` for a filter that is none."""
        with self._connections.snapshot() as db:
            return page(db, listing)

    def pinned(self) -> dict[str, int]:
        """Digest -> bytes in memory of the current version of every pinned adapter."""
        query = (
            "SELECT digest, resident_bytes FROM adapters AS a INDEXED BY adapters_pinned JOIN blobs ON blob = version "
            "WHERE a.pinned = 1"
        )
        with self._connections.reading() as db:
            return {digest.hex(): nbytes for digest, nbytes in db.execute(query)}

    def count(self) -> int:
        return self.counts().adapters

    def counts(self) -> Counts:
        """Kept, not counted."""
        with self._connections.reading() as db:
            query = "SELECT adapters, versions, total(live_count), total(live_bytes) FROM counters, packs"
            return Counts(*(int(number) for number in db.execute(query).fetchone()))

    def store_id(self) -> str:
        """Of this catalogue and its backups, and of no other one."""
        with self._connections.reading() as db:
            store: bytes = db.execute("SELECT store FROM identity").fetchone()[0]
        return store.hex()

    def quarantined_count(self) -> int:
        """Of versions and what they share."""
        with self._connections.reading() as db:
            query = "SELECT count(*) FROM blobs INDEXED BY blobs_quarantined WHERE quarantined = 1"
            return int(db.execute(query).fetchone()[0])

    def check(self, progress: Progress = _untold) -> list[Problem]:
        """Looks at every row; others go on meanwhile."""
        with self._connections.snapshot("check the catalogue") as db:
            return check(db, progress)

    def backup(self, path: Path) -> None:
        """Writes the catalogue as it is now into a new file, durably, while others go on."""
        with self._connections.reading("back up the catalogue") as db:
            backup(db, path)


def already_exists(adapter_id: str) -> AdapterExists:
    return AdapterExists(f"the adapter {adapter_id} exists already", metadata={"adapter": adapter_id})
