"""Versions become current: of one adapter or of thousands in one transaction, by the same way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from overtone.adapters.catalogue.changing import change
from overtone.adapters.catalogue.contents import Content, Contents
from overtone.adapters.catalogue.rows import labels_text, stored
from overtone.adapters.catalogue.transaction import Transaction
from overtone.adapters.catalogue.types import Entry, Outcome
from overtone.adapters.packs import Place


def put_all(transaction: Transaction, entries: Sequence[Entry], places: Mapping[str, Place]) -> list[Outcome]:
    """What became of each, in their order. Entries of one id take effect one after another."""
    outcomes: dict[int, Outcome] = {}
    contents, waiting, now = Contents(transaction, places), dict(enumerate(entries)), transaction.now()
    while waiting:
        first = {entry.adapter_id: number for number, entry in reversed(waiting.items())}
        batch = {number: waiting.pop(number) for number in first.values()}
        outcomes |= _put_batch(transaction, batch, contents, now)
    contents.insert()
    return [outcomes[number] for number in range(len(entries))]


def _put_batch(
    transaction: Transaction, batch: Mapping[int, Entry], contents: Contents, now: int
) -> dict[int, Outcome]:
    """Of entries with different ids."""
    old = stored(transaction.db, [entry.adapter_id for entry in batch.values()])
    outcomes: dict[int, Outcome] = {}
    created: list[Entry] = []
    refused = {number for number, entry in batch.items() if entry.options.create_only and entry.adapter_id in old}
    known = contents.of(entry.version for number, entry in batch.items() if number not in refused)
    for number, entry in batch.items():
        before, options, digest = old.get(entry.adapter_id), entry.options, entry.version.digest
        if number in refused:
            outcomes[number] = Outcome(entry.adapter_id, digest, "exists")
        elif before is None:
            created.append(entry)
            outcomes[number] = Outcome(entry.adapter_id, digest, "created", bool(options.pinned))
        else:
            changed = change(transaction, before, options, now, known[digest])
            pinned = bool(before.pinned if options.pinned is None else options.pinned)
            outcomes[number] = Outcome(entry.adapter_id, digest, "updated" if changed else "unchanged", pinned)
    _create(transaction, created, known, now)
    return outcomes


def _create(transaction: Transaction, entries: Sequence[Entry], known: Mapping[str, Content], now: int) -> None:
    # In the order of the largest indexes, so that neighbours are read and written together.
    entries = sorted(entries, key=lambda entry: (entry.options.tenant or "", entry.adapter_id))
    db = transaction.db
    last = db.execute("SELECT max(adapter) FROM adapters").fetchone()[0] or 0
    rows, history, labels = [], [], []
    for number, entry in enumerate(entries, last + 1):
        content, options = known[entry.version.digest], entry.options
        text, tenant = labels_text(options.labels or {}), options.tenant or None
        row = (number, entry.adapter_id, os.urandom(16), content.blob, bool(options.pinned), text, tenant, now, now)
        rows.append((*row, content.size_bytes, content.class_))
        history.append((number, content.blob))
        labels += [(key, value, entry.adapter_id) for key, value in (options.labels or {}).items()]
    db.executemany("INSERT INTO adapters VALUES (?, ?, ?, ?, NULL, ?, ?, ?, ?, ?, 0, 1, ?, ?)", rows)
    db.executemany("INSERT INTO adapter_versions VALUES (?, 1, ?)", history)
    db.executemany("INSERT INTO labels VALUES (?, ?, ?)", labels)
    transaction.uses.update(blob for _, blob in history)
    transaction.adapters += len(entries)
