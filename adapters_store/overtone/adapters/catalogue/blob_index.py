"""Where each blob is, and which are not needed any more: what packs ask of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence

from overtone.adapters.catalogue.connections import Connections
from overtone.adapters.catalogue.contents import lift, put_at
from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.packs import OWN_FILE, Leaving, PackFacts, Place

_PLACED = "SELECT digest, pack, start, length FROM blobs"


def _nothing(leaving: Sequence[tuple[str, Place]]) -> None:
    pass


class BlobIndex:
    """An `overtone.adapters.packs.BlobIndex`. Thread-safe; every method may raise `StoreFailed`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def place_of(self, digest: str) -> Place | None:
        """None for a blob that is not known. One that is quarantined has its place still."""
        with self._connections.reading() as db:
            row = db.execute(
                "SELECT pack, start, length FROM blobs WHERE digest = ?", (bytes.fromhex(digest),)
            ).fetchone()
        return Place(*row) if row is not None else None

    def refers_to(self, digest: str) -> bool:
        """Whether an adapter has this version, or a known version shares this blob."""
        with self._connections.reading() as db:
            query = "SELECT 1 FROM blobs WHERE digest = ? AND uses > 0"
            return db.execute(query, (bytes.fromhex(digest),)).fetchone() is not None

    def shared_by(self, digest: str) -> tuple[str, ...]:
        """The blobs that a version shares with others."""
        query = (
            "SELECT s.digest FROM blobs AS v CROSS JOIN version_shared ON version = v.blob "
            "CROSS JOIN blobs AS s ON s.blob = shared WHERE v.digest = ?"
        )
        with self._connections.reading() as db:
            return tuple(row[0].hex() for row in db.execute(query, (bytes.fromhex(digest),)))

    def unused(self) -> tuple[str, ...]:
        """Versions that were freed, and not released before the last process ended, or not yet."""
        with self._connections.reading() as db:
            return tuple(
                row[0].hex() for row in db.execute("SELECT digest FROM blobs INDEXED BY blobs_unused WHERE uses = 0")
            )

    def release(self, digests: Sequence[str], before_commit: Leaving = _nothing) -> list[tuple[str, Place]]:
        """Forgets those that nothing refers to, with what only they share, and returns what left.

        Calls `before_commit` with the same inside the transaction, and forgets nothing if it raises.
        """
        left: list[tuple[str, Place]] = []
        with self._connections.writing("remove adapters") as transaction:
            waiting = [bytes.fromhex(digest) for digest in digests]
            while waiting:
                waiting += _forget(transaction, waiting.pop(), left)
            before_commit(left)
        return left

    def quarantine(self, digest: str) -> None:
        """A version is broken, or what versions share, and then all of these. Nothing happens to one that is not known."""
        with self._connections.writing("mark an adapter") as transaction:
            query = "UPDATE blobs SET quarantined = 1 WHERE digest = ? RETURNING blob, kind"
            for blob, kind in transaction.db.execute(query, (bytes.fromhex(digest),)).fetchall():
                if kind is None:
                    versions = "SELECT version FROM version_shared WHERE shared = ?"
                    transaction.db.execute(f"UPDATE blobs SET quarantined = 1 WHERE blob IN ({versions})", (blob,))

    def heal(self, digest: str) -> None:
        """It turned out to be sound, and so may all that shares it. Putting the same content does as much."""
        with self._connections.writing("mark an adapter") as transaction:
            for (blob,) in transaction.db.execute(
                "SELECT blob FROM blobs WHERE digest = ?", (bytes.fromhex(digest),)
            ).fetchall():
                lift(transaction, blob)

    def quarantined(self) -> tuple[str, ...]:
        """What is broken: first what versions share, then versions."""
        query = "SELECT digest FROM blobs INDEXED BY blobs_quarantined WHERE quarantined = 1 ORDER BY kind IS NOT NULL"
        with self._connections.reading() as db:
            return tuple(row[0].hex() for row in db.execute(query))

    def packs(self) -> list[PackFacts]:
        """All packs in which a blob was ever recorded and that were not dropped; none for blobs in own files."""
        with self._connections.reading() as db:
            return [
                PackFacts(*row) for row in db.execute("SELECT * FROM packs WHERE pack > ? ORDER BY pack", (OWN_FILE,))
            ]

    def live_in(self, pack: int, after_offset: int, limit: int) -> list[tuple[str, Place]]:
        """The first `limit` blobs with offsets above `after_offset`, in their order; -1 begins at the beginning."""
        query = f"{_PLACED} INDEXED BY blobs_in_packs WHERE pack > 0 AND pack = ? AND start > ? ORDER BY start LIMIT ?"
        return self._placed(query, (pack, after_offset, limit))

    def own_files(self, after: str, limit: int) -> list[tuple[str, Place]]:
        """The first `limit` blobs in own files with digests above `after`, in their order; "" begins at the beginning.

        A length of 0: what the file says; older catalogues did not know it.
        """
        query = f"{_PLACED} INDEXED BY blobs_in_files WHERE pack = 0 AND digest > ? ORDER BY digest LIMIT ?"
        return self._placed(query, (bytes.fromhex(after), limit))

    def _placed(self, query: str, parameters: tuple[int | bytes, ...]) -> list[tuple[str, Place]]:
        with self._connections.reading() as db:
            return [(digest.hex(), Place(*place)) for digest, *place in db.execute(query, parameters)]

    def move(self, moves: Sequence[tuple[str, Place, Place]]) -> None:
        """(digest, old place, new place): changes those that are still at the old one."""
        query = "SELECT blob FROM blobs WHERE digest = ? AND (pack, start, length) = (?, ?, ?)"
        with self._connections.writing("move adapters") as transaction:
            for digest, old, new in moves:
                key = bytes.fromhex(digest), old.pack, old.offset, old.length
                found = transaction.db.execute(query, key).fetchone()
                if found is not None:
                    put_at(transaction, found[0], old, new)

    def drop_pack(self, number: int) -> bool:
        """Forgets a pack if no blob is left in it; whether it did."""
        with self._connections.writing("forget a pack") as transaction:
            query = "DELETE FROM packs WHERE pack = ? AND pack > 0 AND live_count = 0"
            return transaction.db.execute(query, (number,)).rowcount > 0


def _forget(transaction: Transaction, digest: bytes, left: list[tuple[str, Place]]) -> list[bytes]:
    """Forgets a blob if it has no uses; what it shared with others, to be asked next."""
    db = transaction.db
    query = "SELECT blob, kind, pack, start, length FROM blobs WHERE digest = ? AND uses = 0"
    row = db.execute(query, (digest,)).fetchone()
    if row is None:
        return []
    blob, kind, *place = row
    query = "SELECT blob, digest FROM version_shared JOIN blobs ON blob = shared WHERE version = ?"
    shared = db.execute(query, (blob,)).fetchall()
    db.executemany("UPDATE blobs SET uses = uses - 1 WHERE blob = ?", [(one,) for one, _ in shared])
    db.execute("DELETE FROM version_shared WHERE version = ?", (blob,))
    db.execute("DELETE FROM blobs WHERE blob = ?", (blob,))
    transaction.left(place[0], place[2])
    if kind is not None:
        transaction.versions -= 1
        transaction.kinds[kind] -= 1
    left.append((digest.hex(), Place(*place)))
    return [one for _, one in shared]
