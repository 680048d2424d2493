"""Changes of adapters: one after another, each durable before it is told.

Order of a change: blobs, then the catalogue row, then the event, then memory, and last what is needed no more. From the row
on it has happened, and nothing that fails makes it look otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from overtone.adapters.admission import Admission, checked_entry
from overtone.adapters.catalogue import Catalogue, Entry, Options, Outcome, Resolved, already_exists
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

_log = logging.getLogger(__name__)


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
        version = entry.version
        # Made before others have to wait, and where it may still fail.
        ready = self._made(admitted) if self._versions.residency.state(version.digest) == "stored" else None
        with self._versions.changing, ExitStack() as kept:
            before = self._catalogue.find(adapter_id)
            if options.pinned or (options.pinned is None and before is not None and before.pinned):
                make = partial(self._made, admitted) if ready is None else lambda: ready
                kept.enter_context(self._versions.held(version.digest, version.resident_bytes, make))
            with self._blobs.store(_blobs_of([admitted])) as places:
                with self._lookups.change(adapter_id):
                    record = self._catalogue.put(entry, places)
                self._tell(before, record)
            if ready is not None:  # whoever names it next need not wait for the disk
                self._versions.residency.insert(version.digest, ready)
            self._follow(before, record)
            if len(record.versions) > self._keep:
                self._prune([adapter_id])
            return record

    def _made(self, admitted: Admitted) -> ResidentAdapter:
        return self._versions.made(admitted.encoded.digest, admitted.kind.family, admitted.contents, "memory")

    def _tell(self, before: AdapterRecord | None, record: AdapterRecord) -> None:
        if before is None or before.etag != record.etag:
            self._events.tell("created" if before is None else "updated", record.id, record)

    def _follow(self, before: AdapterRecord | None, record: AdapterRecord | None) -> None:
        """Has pins follow a change, if it is one of them."""
        if _pin(before) != _pin(record):
            self._versions.follow_pins()

    def _prune(self, adapter_ids: Collection[str]) -> None:
        """Forgets versions that are too many. What cannot be forgotten now is when one of these adapters changes again."""
        try:
            with self._lookups.change(*adapter_ids):
                freed = self._catalogue.prune_many(adapter_ids, self._keep)
        except OvertoneError as error:
            _log.warning("old versions of %d adapters are left for their next change: %s", len(adapter_ids), error)
        else:
            self._versions.sweep(freed.versions)

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
            with self._blobs.store(_blobs_of(admitted)) as places:
                with self._lookups.change(*(entry.adapter_id for entry in entries)):
                    outcomes = self._catalogue.put_many(entries, places)
                self._tell_all(outcomes)
            updated = {
                o.adapter_id: (o, one) for o, one in zip(outcomes, admitted, strict=True) if o.outcome == "updated"
            }
            self._pin_all([one for outcome, one in updated.values() if outcome.pinned])
            if updated:
                self._prune(updated)
            return [ImportResult(o.adapter_id, o.digest, o.outcome) for o in outcomes if o.outcome != "exists"]

    def _tell_all(self, outcomes: Sequence[Outcome]) -> None:
        for one in outcomes:
            if one.outcome != "exists" and one.outcome != "unchanged":
                self._events.tell(one.outcome, one.adapter_id)

    def _pin_all(self, pinned: Sequence[Admitted]) -> None:
        if pinned:
            self._versions.follow_pins()
        for admitted in pinned:
            if self._versions.residency.state(admitted.encoded.digest) == "stored":
                self._versions.residency.insert(admitted.encoded.digest, self._made(admitted))

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
            self._tell(before, record)
            self._follow(before, record)
            return record

    def activate(self, adapter_id: str, version: str, etag: str) -> AdapterRecord:
        with self._versions.changing, ExitStack() as after:
            before = self._catalogue.get(check_id(adapter_id), etag)
            if before.pinned:
                found = self._catalogue.target(adapter_id, version)
                after.enter_context(self._versions.held(found.digest, found.resident_bytes))
            with self._lookups.change(adapter_id):
                record = self._catalogue.activate(adapter_id, version, etag)
            self._tell(before, record)
            self._follow(before, record)
            return record

    def delete(self, adapter_id: str, etag: str) -> Deletion:
        with self._versions.changing:
            before = self._catalogue.get(check_id(adapter_id), etag)
            with self._lookups.change(adapter_id):
                freed = self._catalogue.delete(adapter_id, etag)
            self._events.tell("deleted", adapter_id, before)
            self._follow(before, None)
            return self._versions.sweep(freed.versions)


def _pin(record: AdapterRecord | None) -> str:
    """The version that is pinned by an adapter, or ""."""
    return record.digest if record is not None and record.pinned else ""


def _blobs_of(admitted: Sequence[Admitted]) -> dict[str, bytes]:
    """By digest, each once."""
    found: dict[str, bytes] = {}
    for one in admitted:
        for digest, blob in one.encoded.shared.items():
            found.setdefault(digest, blob)
        found[one.encoded.digest] = one.encoded.blob
    return found
