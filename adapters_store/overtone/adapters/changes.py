"""Changes of adapters: one after another, each durable before it is told.

Order of a change: blobs, then the catalogue row, then the event, then memory, and last what is needed no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

from overtone.adapters.admission import Admission, checked_entry
from overtone.adapters.catalogue import Catalogue, Entry, Options, Resolved, already_exists
from overtone.adapters.events import Events
from overtone.adapters.files import AdapterFiles
from overtone.adapters.lookups import Lookups
from overtone.adapters.operations import Deletion, ImportItem, ImportResult
from overtone.adapters.packs import Blobs
from overtone.adapters.recipes import Admitted
from overtone.adapters.records import AdapterRecord, StoreConfig, check_id, check_labels
from overtone.adapters.residency import ENTRY_BYTES
from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.versions import Versions
from overtone.errors import OvertoneError


class Changes:
    """Thread-safe. What the methods answer and raise: see those of `AdapterStore`."""

    def __init__(
        self,
        config: StoreConfig,
        blobs: Blobs,
        catalogue: Catalogue,
        versions: Versions,
        lookups: Lookups[Resolved],
        admission: Admission,
        events: Events,
    ) -> None:
        self._keep, self._room = config.keep_versions, config.memory_bytes - ENTRY_BYTES
        self._blobs, self._catalogue, self._versions = blobs, catalogue, versions
        self._lookups, self._admission, self._events = lookups, admission, events

    def commit(self, adapter_id: str, read: Callable[[], AdapterFiles], options: Options) -> AdapterRecord:
        if options.create_only and self._catalogue.exists(check_id(adapter_id)):
            raise already_exists(adapter_id)
        check_id(adapter_id)
        check_labels(options.labels or {})
        admitted = self._admission.admit(read())
        entry = checked_entry(adapter_id, admitted, options, self._room)
        if options.validate_only:
            return self._catalogue.put(entry, {})
        version, make = entry.version, partial(self._made, admitted)
        with self._versions.changing, ExitStack() as after:
            if options.pinned or (options.pinned is None and self._catalogue.is_pinned(adapter_id)):
                after.enter_context(self._versions.held(version.digest, version.resident_bytes, make))
            before = self._catalogue.find(adapter_id)
            with self._blobs.store(_blobs_of([admitted])) as places, self._lookups.change(adapter_id):
                record = self._catalogue.put(entry, places)
            # Whoever names it next need not wait for the disk.
            self._versions.residency.insert(version.digest, make())
            self._prune(record)
            if record.pinned or (before is not None and before.pinned):
                self._versions.follow_pins()
            if before is None or before.etag != record.etag:
                self._events.tell("created" if before is None else "updated", adapter_id, record)
            return record

    def _made(self, admitted: Admitted) -> ResidentAdapter:
        return self._versions.made(admitted.encoded.digest, admitted.kind.family, admitted.contents, "memory")

    def import_many(self, items: Sequence[ImportItem]) -> list[ImportResult]:
        refused: dict[int, OvertoneError] = {}
        found: dict[int, tuple[Admitted, Entry]] = {}
        for place, item in enumerate(items):
            try:
                admitted = self._admission.admit(item.files)
                options = Options(labels=item.labels, tenant=item.tenant)
                entry = checked_entry(item.adapter_id, admitted, options, self._room)
            except OvertoneError as error:
                refused[place] = error
            else:
                found[place] = admitted, entry
        outcomes = self._put_many([admitted for admitted, _ in found.values()], [e for _, e in found.values()])
        stored = dict(zip(found, outcomes, strict=True))
        return [
            ImportResult(item.adapter_id, "", "refused", refused[place]) if place in refused else stored[place]
            for place, item in enumerate(items)
        ]

    def _put_many(self, admitted: Sequence[Admitted], entries: Sequence[Entry]) -> list[ImportResult]:
        if not entries:
            return []
        with self._versions.changing:
            with self._blobs.store(_blobs_of(admitted)) as places, ExitStack() as changes:
                for entry in entries:
                    changes.enter_context(self._lookups.change(entry.adapter_id))
                outcomes = self._catalogue.put_many(entries, places)
            results = [ImportResult(o.adapter_id, o.digest, o.outcome) for o in outcomes if o.outcome != "exists"]
            for result, one in zip(results, admitted, strict=True):
                if result.outcome == "updated" or (result.outcome == "created" and self._events.heard):
                    self._imported(result.outcome, self._catalogue.get(result.adapter_id), one)
            return results

    def _imported(self, kind: Literal["created", "updated"], record: AdapterRecord, admitted: Admitted) -> None:
        self._prune(record)
        if record.pinned and record.digest == admitted.encoded.digest:  # an id may come twice in a batch
            self._versions.follow_pins()
            self._versions.residency.insert(record.digest, self._made(admitted))
        self._events.tell(kind, record.id, record)

    def _prune(self, record: AdapterRecord) -> None:
        """Forgets versions that are too many."""
        if len(record.versions) > self._keep:
            with self._lookups.change(record.id):
                freed = self._catalogue.prune(record.id, self._keep)
            self._versions.sweep(freed.versions)

    def update(
        self, adapter_id: str, *, pinned: bool | None, labels: Mapping[str, str] | None, etag: str
    ) -> AdapterRecord:
        checked = None if labels is None else check_labels(labels)
        with self._versions.changing, ExitStack() as after:
            before = self._catalogue.get(check_id(adapter_id), etag)
            if pinned:
                found = self._catalogue.resolve(adapter_id)
                after.enter_context(self._versions.held(found.digest, found.resident_bytes))
            with self._lookups.change(adapter_id):
                record = self._catalogue.update(adapter_id, pinned=pinned, labels=checked, etag=etag)
            self._versions.follow_pins()
            if record.etag != before.etag:
                self._events.tell("updated", adapter_id, record)
            return record

    def activate(self, adapter_id: str, version: str, etag: str) -> AdapterRecord:
        with self._versions.changing, ExitStack() as after:
            before = self._catalogue.get(check_id(adapter_id), etag)
            if before.pinned and version:
                found = self._catalogue.resolve(adapter_id, version)
                after.enter_context(self._versions.held(found.digest, found.resident_bytes))
            with self._lookups.change(adapter_id):
                record = self._catalogue.activate(adapter_id, version, etag)
            self._versions.follow_pins()
            if record.etag != before.etag:
                self._events.tell("updated", adapter_id, record)
            return record

    def delete(self, adapter_id: str, etag: str) -> Deletion:
        with self._versions.changing:
            before = self._catalogue.get(check_id(adapter_id), etag)
            with self._lookups.change(adapter_id):
                freed = self._catalogue.delete(adapter_id, etag)
            self._versions.follow_pins()
            deletion = self._versions.sweep(freed.versions)
            self._events.tell("deleted", adapter_id, before)
            return deletion


def _blobs_of(admitted: Sequence[Admitted]) -> dict[str, bytes]:
    """By digest, each once."""
    found: dict[str, bytes] = {}
    for one in admitted:
        for digest, blob in one.encoded.shared.items():
            found.setdefault(digest, blob)
        found[one.encoded.digest] = one.encoded.blob
    return found
