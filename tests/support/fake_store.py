"""A store in memory with the interface of `AdapterStore` and none of its parts: for the services that stand on it.

Content is whatever bytes come; a weights file "bad" is refused, one that is "broken" makes the store fail.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from overtone.adapters.events import Events
from overtone.adapters.files import AdapterFiles
from overtone.adapters.operations import (
    Compaction,
    Deletion,
    Event,
    ImportItem,
    ImportResult,
    Problem,
    Progress,
)
from overtone.adapters.paging import check_page_size
from overtone.adapters.records import AdapterRecord, StoreStats, check_id, check_labels
from overtone.adapters.upload import Upload
from overtone.errors import AdapterNotFound, EtagMismatch, InvalidAdapter, InvalidRequest, OvertoneError, StoreFailed

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class FakeStore:
    """work: how many steps compaction and checks take, each of which waits for `go`."""

    tmp: Any = None
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    previous: dict[str, list[str]] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    work: int = 3

    def __post_init__(self) -> None:
        self._events, self._lock = Events(), threading.RLock()
        self.go = threading.Event()
        self.go.set()
        self.stopped = threading.Event()

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        return self._events.subscribe(listener)

    def begin_upload(self) -> Upload:
        return Upload(self.tmp, 1 << 20)

    def commit_upload(self, upload: Upload, adapter_id: str, **options: Any) -> AdapterRecord:
        return self._put(adapter_id, upload.read(), **options)

    def import_many(self, items: Sequence[ImportItem]) -> list[ImportResult]:
        self.batches.append([item.adapter_id for item in items])
        assert self.go.wait(60)
        return [self._import(item) for item in items]

    def _import(self, item: ImportItem) -> ImportResult:
        if item.files.weights == b"broken":
            raise StoreFailed("the disk is full")
        before = self.records.get(item.adapter_id)
        try:
            record = self._put(item.adapter_id, item.files, labels=item.labels, tenant=item.tenant)
        except OvertoneError as error:
            return ImportResult(item.adapter_id, "", "refused", error)
        outcome: Any = "created" if before is None else "unchanged" if before == record else "updated"
        return ImportResult(item.adapter_id, record.digest, outcome)

    def _put(
        self,
        adapter_id: str,
        files: AdapterFiles,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> AdapterRecord:
        check_id(adapter_id)
        check_labels(labels or {})
        if files.weights == b"bad":
            raise InvalidAdapter("spectrum has 3 numbers, not 4", field="spectrum")
        digest = hashlib.sha256(files.config + files.weights).hexdigest()
        with self._lock:
            old = self.records.get(adapter_id)
            new = old or _record(adapter_id)
            new = replace(
                new,
                digest=digest,
                size_bytes=len(files.weights),
                labels=new.labels if labels is None else labels,
                pinned=new.pinned if pinned is None else pinned,
                tenant=new.tenant if tenant is None else tenant,
                versions=(digest, *(each for each in new.versions if each != digest)),
            )
            return self._keep(old, new)

    def _keep(self, old: AdapterRecord | None, new: AdapterRecord) -> AdapterRecord:
        if new == old:
            return new
        new = replace(new, etag=uuid.uuid4().hex)
        self.records[new.id] = new
        if old is not None and old.digest != new.digest:
            self.previous.setdefault(new.id, []).append(old.digest)
        self._events.tell("created" if old is None else "updated", new.id, new)
        return new

    def get(self, adapter_id: str, etag: str = "") -> AdapterRecord:
        record = self.records.get(check_id(adapter_id))
        if record is None:
            raise AdapterNotFound(f"there is no adapter {adapter_id}", metadata={"adapter": adapter_id})
        if etag and etag != record.etag:
            raise EtagMismatch("it was changed", field="etag")
        return record

    def list(
        self, page_size: int, page_token: str = "", filter: str = "", order_by: str = ""
    ) -> tuple[list[AdapterRecord], str]:
        """filter: one condition on the tenant; order_by: by id or by size."""
        match = re.fullmatch(r'tenant = "([a-z]*)"', filter)
        if filter and match is None:
            raise InvalidRequest(f"cannot read {filter!r}", field="filter")
        found = [r for r in self.records.values() if match is None or r.tenant == match[1]]
        key, _, descending = (order_by or "id").partition(" ")
        found.sort(key=lambda r: r.id if key == "id" else r.size_bytes, reverse=descending == "desc")
        start, size = int(page_token or 0), check_page_size(page_size)
        return found[start : start + size], str(start + size) if start + size < len(found) else ""

    def update(
        self, adapter_id: str, *, pinned: bool | None = None, labels: Mapping[str, str] | None = None, etag: str = ""
    ) -> AdapterRecord:
        with self._lock:
            old = self.get(adapter_id, etag)
            changes = {"pinned": pinned, "labels": labels}
            return self._keep(old, replace(old, **{k: v for k, v in changes.items() if v is not None}))  # type: ignore[arg-type]

    def activate(self, adapter_id: str, version: str = "", *, etag: str = "") -> AdapterRecord:
        with self._lock:
            old = self.get(adapter_id, etag)
            known = list(old.versions) if version else self.previous.get(adapter_id, [])[-1:]
            digest = next((each for each in known if each.startswith(version)), None)
            if digest is None:
                raise AdapterNotFound(f"the adapter {adapter_id} has no version {version or 'before this one'}")
            return self._keep(old, replace(old, digest=digest))

    def delete(self, adapter_id: str, *, etag: str = "") -> Deletion:
        with self._lock:
            record = self.get(adapter_id, etag)
            del self.records[adapter_id]
            held = self.leases.get(record.digest, 0)
            self._events.tell("deleted", adapter_id, record)
            size = record.size_bytes
            return Deletion(0 if held else size, size if held else 0, held)

    def residency_state(self, digest: str) -> str:
        return "resident" if self.leases.get(digest) else "stored"

    def stats(self) -> StoreStats:
        return StoreStats(len(self.records), 1, 2, 3, 4, 5, 6, 7, 8, miss_count=9, store_id="s-1", disk_bytes=10)

    def compact(self, progress: Progress) -> Compaction:
        self._steps(progress)
        return Compaction(2, 300, 1000, tuple(self.problems))

    def check(self, deep: bool, progress: Progress) -> list[Problem]:
        self._steps(progress)
        return self.problems if deep else []

    def backup(self, folder: Path, progress: Progress) -> None:
        folder.mkdir()
        (folder / "copy").write_text("of it")
        self._steps(progress)

    def _steps(self, progress: Progress) -> None:
        try:
            for step in range(self.work):
                assert self.go.wait(60)
                progress(step + 1, self.work)
        except OvertoneError:
            self.stopped.set()
            raise

    def export(self, adapter_ids: Sequence[str], file: BinaryIO) -> None:
        for record in [self.get(adapter_id) for adapter_id in adapter_ids]:
            for _ in range(self.work):
                file.write(record.digest.encode() * 4096)


def _record(adapter_id: str) -> AdapterRecord:
    return AdapterRecord(
        id=adapter_id,
        uid=uuid.uuid4().hex,
        digest="",
        family="loca",
        pinned=False,
        labels={},
        size_bytes=0,
        module_count=2,
        parameter_count=20,
        base_model_name_or_path="",
        warnings=(),
        basis="",
        create_time=_EPOCH,
        update_time=_EPOCH,
        etag="",
        versions=(),
        base_fingerprint="f" * 64,
        tenant="",
        state="ready",
        last_used_time=None,
    )
