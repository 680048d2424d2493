"""Entries of an import in batches, each of which fits into one message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from overtone.client import _adapter_responses as responses
from overtone.client._adapter_requests import bare_id
from overtone.client.adapter_types import ImportEntry, ImportResult
from overtone.errors import TooLarge
from overtone.v1 import adapters_pb2

MAX_ENTRIES = 256
_FULL_BYTES = 1 << 20
_MAX_BYTES = 8 << 20
"""What the server takes in one batch."""


@dataclass
class Batch:
    """Entries that travel together. refused: those, by their place, that are too large to travel."""

    entries: list[ImportEntry] = field(default_factory=list)
    refused: dict[int, ImportResult] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, entry: ImportEntry) -> bool:
        """False, and nothing else, if there is no room for it beside the others."""
        size = sum(map(len, entry.files.values()))
        if self.entries and (len(self.entries) == MAX_ENTRIES or self.nbytes + min(size, _MAX_BYTES) > _FULL_BYTES):
            return False
        if size > _MAX_BYTES:
            message = f"the adapter has {size} bytes; an import takes at most {_MAX_BYTES} of one: upload it by itself"
            self.refused[len(self.entries)] = ImportResult(entry.id, "refused", "", TooLarge(message, field="files"))
            size = 0
        self.entries.append(entry)
        self.nbytes += size
        return True

    def message(self) -> adapters_pb2.ImportAdaptersRequest:
        sent = (entry for i, entry in enumerate(self.entries) if i not in self.refused)
        return adapters_pb2.ImportAdaptersRequest(adapters=map(_item, sent))

    def results(self, response: adapters_pb2.ImportAdaptersResponse) -> Iterator[ImportResult]:
        """For all entries, in their order."""
        answered = iter(response.results)
        for i in range(len(self.entries)):
            yield self.refused[i] if i in self.refused else responses.import_result(next(answered))


def batches(entries: Iterable[ImportEntry]) -> Iterator[Batch]:
    batch = Batch()
    for entry in entries:
        if not batch.add(entry):
            yield batch
            batch = Batch()
            batch.add(entry)
    if batch.entries:
        yield batch


def _item(entry: ImportEntry) -> adapters_pb2.ImportItem:
    return adapters_pb2.ImportItem(
        adapter_id=bare_id(entry.id), files=entry.files, labels=entry.labels or {}, tenant=entry.tenant
    )
