"""Changes of adapters that exist; every function works inside a transaction of its caller."""

from __future__ import annotations

from collections.abc import Sequence

from overtone.adapters.catalogue.contents import Content
from overtone.adapters.catalogue.rows import Stored, find_version, labels_of, labels_text, no_previous
from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.catalogue.types import Freed, Options

Value = str | int | None


def change(transaction: Transaction, old: Stored, options: Options, now: int, content: Content | None = None) -> bool:
    """Sets what differs: the options that are not None, and the content, which becomes the newest. Whether any did."""
    new: dict[str, Value] = {}
    if content is not None and content.blob != old.version:
        new |= _pointing(old, content)
        _append_version(transaction, old.adapter, content.blob)
    if options.pinned is not None and options.pinned != bool(old.pinned):
        new["pinned"] = int(options.pinned)
    if options.tenant is not None and (options.tenant or None) != old.tenant:
        new["tenant"] = options.tenant or None
    if options.labels is not None and dict(options.labels) != labels_of(old.labels):
        new["labels"] = labels_text(options.labels)
        _delete_labels(transaction, old)
        labels = [(key, value, old.id) for key, value in options.labels.items()]
        transaction.db.executemany("INSERT INTO labels VALUES (?, ?, ?)", labels)
    return _set(transaction, old, new, now)


def activate(transaction: Transaction, old: Stored, prefix: str) -> None:
    """Makes the kept version that begins with `prefix` current, or with "" the one that was before.

    Raises `AdapterNotFound`, `InvalidRequest`.
    """
    target = find_version(transaction.db, old, prefix) if prefix else old.previous
    if target is None:
        raise no_previous(old.id)
    if target != old.version:
        query = "SELECT blob, length, class FROM blobs JOIN kinds USING (kind) WHERE blob = ?"
        content = Content(*transaction.db.execute(query, (target,)).fetchone())
        _set(transaction, old, _pointing(old, content), transaction.now())


def delete(transaction: Transaction, old: Stored) -> Freed:
    query = "SELECT version FROM adapter_versions WHERE adapter = ? ORDER BY sequence DESC"
    versions = [row[0] for row in transaction.db.execute(query, (old.adapter,))]
    transaction.db.execute("DELETE FROM adapter_versions WHERE adapter = ?", (old.adapter,))
    transaction.db.execute("DELETE FROM adapters WHERE adapter = ?", (old.adapter,))
    _delete_labels(transaction, old)
    transaction.adapters -= 1
    return _freed(transaction, versions)


def prune(transaction: Transaction, old: Stored, keep: int) -> Freed:
    """Forgets the versions that are older than the newest `keep`, but for the current one."""
    query = "SELECT sequence, version FROM adapter_versions WHERE adapter = ? ORDER BY sequence DESC LIMIT -1 OFFSET ?"
    rows = [row for row in transaction.db.execute(query, (old.adapter, keep)) if row[1] != old.version]
    transaction.db.executemany(
        "DELETE FROM adapter_versions WHERE adapter = ? AND sequence = ?", [(old.adapter, row[0]) for row in rows]
    )
    versions = [version for _, version in rows]
    if old.previous in versions:
        transaction.db.execute("UPDATE adapters SET previous = NULL WHERE adapter = ?", (old.adapter,))
    return _freed(transaction, versions)


def _pointing(old: Stored, content: Content) -> dict[str, Value]:
    repeated = {"size_bytes": content.size_bytes, "class": content.class_}
    return {"version": content.blob, "previous": old.version, **repeated}


def _set(transaction: Transaction, old: Stored, new: dict[str, Value], now: int) -> bool:
    if new:
        # Later than before even if the clock was set back.
        new["update_time"] = max(now, old.update_time + 1)
        columns = ", ".join(f"{column} = ?" for column in new)
        query = f"UPDATE adapters SET {columns}, revision = revision + 1 WHERE adapter = ?"
        transaction.db.execute(query, (*new.values(), old.adapter))
    return bool(new)


def _append_version(transaction: Transaction, adapter: int, blob: int) -> None:
    """Content that comes back counts as new again."""
    query = "DELETE FROM adapter_versions WHERE adapter = ? AND version = ?"
    again = transaction.db.execute(query, (adapter, blob)).rowcount
    transaction.db.execute(
        "INSERT INTO adapter_versions SELECT ?1, 1 + coalesce(max(sequence), 0), ?2 FROM adapter_versions "
        "WHERE adapter = ?1",
        (adapter, blob),
    )
    transaction.uses[blob] += 1 - again


def _delete_labels(transaction: Transaction, old: Stored) -> None:
    gone = [(key, value, old.id) for key, value in labels_of(old.labels).items()]
    transaction.db.executemany("DELETE FROM labels WHERE key = ? AND value = ? AND id = ?", gone)


def _freed(transaction: Transaction, versions: Sequence[int]) -> Freed:
    """Which of `versions`, each of which lost one use, have none left."""
    transaction.uses.subtract(versions)
    transaction.write_uses()
    query = "SELECT digest FROM blobs WHERE blob = ? AND uses = 0"
    found = [transaction.db.execute(query, (version,)).fetchone() for version in versions]
    return Freed(tuple(row[0].hex() for row in found if row is not None))
