"""The store of adapters: blobs on disk, their catalogue, and the adapters in memory, behind one thread-safe interface.

Order of a change: see `changes`. Order of a deletion: the row, then, when the last lease is gone, memory and blobs. What a
crash leaves in between the catalogue knows, and the next start removes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from overtone.adapters.admission import Admission
from overtone.adapters.archive import write_archive
from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical import Known
from overtone.adapters.catalogue import Options, Resolved
from overtone.adapters.changes import Changes
from overtone.adapters.disk import StoreDisk
from overtone.adapters.events import Events
from overtone.adapters.folder import read_folder
from overtone.adapters.last_used import LastUsed
from overtone.adapters.lease import Lease
from overtone.adapters.leasing import Leasing, Wanted
from overtone.adapters.lookups import Lookups
from overtone.adapters.operations import Compaction, Deletion, Event, ImportItem, ImportResult, Problem, Progress
from overtone.adapters.packs.folder import corrupted
from overtone.adapters.packs.problem import no_progress
from overtone.adapters.paging import Listing, check_page_size, make_page_token, parse_order, parse_page_token
from overtone.adapters.pending import PendingLease
from overtone.adapters.projectors import Projectors
from overtone.adapters.records import AdapterRecord, StoreConfig, StoreStats, check_id
from overtone.adapters.residency import State
from overtone.adapters.shared import SharedBlobs
from overtone.adapters.upkeep import Upkeep
from overtone.adapters.upload import Upload
from overtone.adapters.versions import Versions
from overtone.errors import StoreFailed

__all__ = [
    "AdapterRecord",
    "AdapterStore",
    "Compaction",
    "Deletion",
    "Event",
    "ImportItem",
    "ImportResult",
    "Lease",
    "Problem",
    "Progress",
    "StoreConfig",
    "StoreStats",
    "Upload",
    "Wanted",
]

_log = logging.getLogger(__name__)
_PROJECTOR_ROWS = 256
"""PiCa's usual rank."""
_UPKEEP_S = 5.0


class AdapterStore:
    """Every method is thread-safe and may block on the disk, but for `acquire_resident`."""

    def __init__(self, config: StoreConfig, base: BaseDescription, device: torch.device | None = None) -> None:
        """Recovers from whatever ended the last process. device: where adapters become resident; None: the CPU.

        Raises `ConfigError` if another process uses the store, or if its catalogue is missing.
        """
        self._config, self._events, self._used = config, Events(), LastUsed()
        with ExitStack() as undo:
            self._disk = undo.enter_context(StoreDisk(config))
            self._blobs, self._catalogue = self._disk.blobs, self._disk.catalogue
            projectors = Projectors(config.root / "bases" / base.fingerprint[:16], base, step=_PROJECTOR_ROWS)
            known = Known()
            self._admission = Admission(config, base, projectors, known)
            self._sharing = sharing = SharedBlobs(self._blobs, projectors, known)
            self._versions = Versions(self._blobs, self._catalogue, base, sharing, config.memory_bytes, device)
            self._lookups = Lookups(self._resolve)
            self._versions.on_broken = self._set_aside
            self._changes = Changes(
                config, self._blobs, self._catalogue, self._versions, self._lookups, self._admission, self._events
            )
            self._leasing = Leasing(self._lookups, self._versions, self._admission.admit, self._used, self._tenant_of)
            self._versions.sweep(self._catalogue.unused())
            self._versions.load_pinned()
            self._upkeep = Upkeep([self.flush, self._versions.catch_up, self._tidy], _UPKEEP_S)
            self._closing = undo.pop_all()

    @property
    def on_load(self) -> Callable[[float], None] | None:
        """Told the seconds of each load from disk."""
        return self._versions.on_load

    @on_load.setter
    def on_load(self, listener: Callable[[float], None] | None) -> None:
        self._versions.on_load = listener

    def on_freed(self, listener: Callable[[str], None]) -> None:
        """listener: told the digest of each version that was deleted and is leased no more, by whichever thread freed it."""
        self._versions.on_freed = listener

    def close(self) -> None:
        """Lets go of everything even if the disk refuses what is still to be written down."""
        self._upkeep.close()
        try:
            self.flush()
        except StoreFailed as error:
            _log.warning("when adapters were last used is lost: %s", error)
        finally:
            self._versions.close()
            self._closing.close()

    def flush(self) -> None:
        """Writes down when adapters were last used. Raises `StoreFailed`, and the next call tries again."""
        if used := self._used.take():
            try:
                self._catalogue.touch(used)
            except StoreFailed:
                self._used.put_back(used)
                raise

    def _tidy(self) -> None:
        self._disk.tidy(lambda: self._upkeep.ending)

    def begin_upload(self) -> Upload:
        """Waits for nothing."""
        return Upload(self._disk.folder.tmp, self._config.max_upload_bytes)

    def commit_upload(
        self,
        upload: Upload,
        adapter_id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> AdapterRecord:
        """Validates what was uploaded and makes it the current version of `adapter_id`, durably.

        Raises `InvalidAdapter`, `InvalidRequest`, `AdapterExists`, `AdapterMemoryFull`, `StoreFailed`.
        """
        options = Options(pinned, labels, tenant, create_only, validate_only)
        record = self._changes.commit(adapter_id, upload.read, options)
        upload.abort()
        return record

    def load_folder(
        self,
        path: str,
        adapter_id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> AdapterRecord:
        """`commit_upload` of a folder below one of the allowed directories. Also raises `PathRefused`, `TooLarge`."""
        read = partial(read_folder, self._config.adapter_roots, path, self._config.max_upload_bytes)
        return self._changes.commit(adapter_id, read, Options(pinned, labels, tenant, create_only, validate_only))

    def import_many(self, items: Sequence[ImportItem]) -> list[ImportResult]:
        """`commit_upload` of many by one transaction: a result for each, in their order.

        Those that are refused do not keep the others out. Raises `StoreFailed`, and then none was stored.
        """
        return self._changes.import_many(items)

    def update(
        self, adapter_id: str, *, pinned: bool | None = None, labels: Mapping[str, str] | None = None, etag: str = ""
    ) -> AdapterRecord:
        """Changes what is not None. Raises `AdapterNotFound`, `EtagMismatch`, `AdapterMemoryFull` (pinned only)."""
        return self._changes.update(adapter_id, pinned=pinned, labels=labels, etag=etag)

    def activate(self, adapter_id: str, version: str = "", *, etag: str = "") -> AdapterRecord:
        """Makes a kept version the current one, by the beginning of its digest; "": the one that was current before.

        Raises `AdapterNotFound`, `EtagMismatch`, `AdapterMemoryFull` (of a pinned adapter).
        """
        return self._changes.activate(adapter_id, version, etag)

    def delete(self, adapter_id: str, *, etag: str = "") -> Deletion:
        """Forgets an adapter with its versions; leases on them go on. Says what that frees now, and what when they end.

        Raises `AdapterNotFound`, `EtagMismatch`.
        """
        return self._changes.delete(adapter_id, etag)

    def _resolve(self, adapter_id: str, prefix: str) -> Resolved:
        """What is broken is not remembered as what an id means: an upload may heal it under another id."""
        resolved = self._catalogue.resolve(adapter_id, prefix)
        if resolved.state == "quarantined":
            raise corrupted(resolved.digest, "was found broken and is set aside")
        return resolved

    def _tenant_of(self, adapter_id: str) -> str | None:
        record = self._catalogue.find(adapter_id)
        return None if record is None else record.tenant

    def _set_aside(self, digest: str) -> None:
        """A version is broken, or what versions share."""
        self._catalogue.quarantine(digest)
        self._lookups.change_all()

    def get(self, adapter_id: str) -> AdapterRecord:
        return self._catalogue.get(check_id(adapter_id))

    def list(
        self, page_size: int, page_token: str = "", filter: str = "", order_by: str = ""
    ) -> tuple[list[AdapterRecord], str]:
        """One page and the token of the next, "" after the last. filter: see `catalogue.filters`; order_by: `parse_order`.

        Raises `InvalidRequest`.
        """
        listing = Listing(check_page_size(page_size), filter, parse_order(order_by))
        page = self._catalogue.page(replace(listing, after=parse_page_token(page_token, listing)))
        return page.records, make_page_token(listing, page.next)

    def acquire(self, reference: str) -> Lease:
        """A lease on the version that "id" or "id@digest" means now. Raises what `acquire_all` raises."""
        return self.acquire_all([Wanted(reference)])

    def acquire_all(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease:
        """A lease on the weighted sum of adapters; see `Leasing.acquire`."""
        return self._leasing.acquire(wanted, tenant)

    def acquire_resident(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease | None:
        """`acquire_all` that may not block on anything, from memory alone; see `Leasing.acquire_resident`."""
        return self._leasing.acquire_resident(wanted, tenant)

    def begin(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease | PendingLease:
        """`acquire_all` that waits for no load: what is to be read from disk or added up is left to a `PendingLease`."""
        pending = self._leasing.begin(wanted, tenant)
        return pending.finish() if pending.ready else pending

    def residency_state(self, digest: str) -> State:
        return self._versions.residency.state(digest)

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """See `Events.subscribe`."""
        return self._events.subscribe(listener)

    def stats(self) -> StoreStats:
        stats = self._disk.stats(self._versions.residency)
        missing = self._lookups.missing
        memo_bytes = self._admission.memo_bytes + self._sharing.nbytes
        return replace(stats, memo_bytes=memo_bytes, negative_count=missing.entries, negative_hit_count=missing.hits)

    def compact(self, progress: Progress = no_progress, *, below: float = 0.5) -> Compaction:
        """Gives back the disk space of what was deleted. Raises `StoreFailed`, and nothing is lost then."""
        return self._blobs.compact(below, progress)

    def check(self, deep: bool = False, progress: Progress = no_progress, *, repair: bool = False) -> Sequence[Problem]:
        """What is wrong with the store; see `StoreDisk.check`."""
        found = self._disk.check(deep, progress, repair=repair)
        self._lookups.change_all()  # quarantined or not
        return found

    def backup(self, folder: Path, progress: Progress = no_progress) -> None:
        """Copies the store as it is now into an empty folder, from which it can be served. Changes wait meanwhile."""
        # In this order: a compaction may take long, and changes need not wait for it.
        with self._blobs.still(), self._versions.changing:
            self._disk.backup(folder, progress)

    def export(self, adapter_ids: Sequence[str], file: BinaryIO) -> None:
        """Writes a tar archive that `import` takes, of any tenant's adapters. Raises `AdapterNotFound` before it writes."""
        with ExitStack() as kept:
            records = []
            for adapter_id in adapter_ids:
                with self._versions.changing:
                    record = self.get(adapter_id)
                    self._versions.residency.retain(record.digest)  # so that it is not removed: nothing is loaded
                kept.callback(self._versions.release, record.digest)
                records.append(record)
            write_archive(records, self._catalogue, self._blobs, file)
