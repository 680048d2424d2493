"""The adapter store: uploads in, leases on immutable versions out. Ties catalogue, blobs and memory together.

Order of a commit: blob durable, then memory if pinned, then the catalogue row, which is the acknowledgement. Order of a
deletion: the row, then, when the last lease is gone, memory and blob. A crash in between leaves a blob without a row,
and the next start removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.blob import Encoded, encode
from overtone.adapters.blobs import BlobFolder
from overtone.adapters.catalogue import Catalogue, Options, already_exists
from overtone.adapters.families import ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.files import AdapterFiles
from overtone.adapters.folder import read_folder
from overtone.adapters.lease import Lease
from overtone.adapters.leasing import Leasing, Wanted
from overtone.adapters.pending import PendingLease
from overtone.adapters.projectors import Projectors
from overtone.adapters.records import (
    AdapterRecord,
    StoreConfig,
    StoreStats,
    Version,
    check_id,
    check_labels,
    check_page_size,
    make_page_token,
    parse_page_token,
)
from overtone.adapters.residency import State
from overtone.adapters.resident import resident_nbytes
from overtone.adapters.shared import pack
from overtone.adapters.upload import Upload
from overtone.adapters.versions import Versions
from overtone.errors import AdapterMemoryFull, ConfigError

__all__ = ["AdapterRecord", "AdapterStore", "Lease", "StoreConfig", "StoreStats", "Upload", "Wanted"]

Records = list[AdapterRecord]

_PROJECTOR_ROWS = 256
"""PiCa's usual rank."""


class AdapterStore:
    """Every method is thread-safe and may block on the disk."""

    def __init__(self, config: StoreConfig, base: BaseDescription, device: torch.device | None = None) -> None:
        """Recovers from whatever ended the last process. device: where adapters become resident; None: the CPU.

        Raises `ConfigError` if another process uses the store, or if its catalogue is missing.
        """
        self._config, self._base = config, base
        with ExitStack() as undo:
            self._blobs = BlobFolder(config.root)
            undo.callback(self._blobs.close)
            self._catalogue = Catalogue(_catalogue_path(self._blobs))
            undo.callback(self._catalogue.close)
            self._blobs.recover(self._catalogue.digests())
            projectors = Projectors(config.root / "bases" / base.fingerprint[:16], base, step=_PROJECTOR_ROWS)
            self._context = ParserContext(base, projectors=projectors, max_numbers=config.max_upload_bytes // 4)
            self._versions = Versions(self._blobs, self._catalogue, base, projectors, config.memory_bytes, device)
            self._leasing = Leasing(self._catalogue, self._versions, self._context, strict_base=config.strict_base)
            self._versions.load_pinned()
            undo.pop_all()

    @property
    def on_load(self) -> Callable[[float], None] | None:
        """Told the seconds of each load from disk."""
        return self._versions.on_load

    @on_load.setter
    def on_load(self, listener: Callable[[float], None] | None) -> None:
        self._versions.on_load = listener

    def close(self) -> None:
        self._versions.close()

    def begin_upload(self) -> Upload:
        return Upload(self._blobs.tmp, self._config.max_upload_bytes)

    def commit_upload(
        self,
        upload: Upload,
        adapter_id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> AdapterRecord:
        """Validates what was uploaded and makes it the current version of `adapter_id`, durably.

        Raises `InvalidAdapter`, `InvalidRequest`, `AdapterExists`, `AdapterMemoryFull` (pinned only), `StoreFailed`.
        """
        record = self._admit(adapter_id, upload.read, Options(pinned, labels, create_only, validate_only))
        upload.abort()
        return record

    def load_folder(
        self,
        path: str,
        adapter_id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> AdapterRecord:
        """`commit_upload` of a folder below one of the allowed directories. Also raises `PathRefused`, `TooLarge`."""
        read = partial(read_folder, self._config.adapter_roots, path, self._config.max_upload_bytes)
        return self._admit(adapter_id, read, Options(pinned, labels, create_only, validate_only))

    def _admit(self, adapter_id: str, read: Callable[[], AdapterFiles], options: Options) -> AdapterRecord:
        check_id(adapter_id)
        check_labels(options.labels or {})
        if options.create_only and self._catalogue.exists(adapter_id):
            raise already_exists(adapter_id)
        parsed = parse_adapter(read(), self._context, strict_base=self._config.strict_base)
        encoded = encode(self._bound(parsed))
        version = _version(parsed, encoded)
        if not self._versions.residency.fits(version.resident_bytes):
            raise AdapterMemoryFull(
                f"the adapter needs {version.resident_bytes} bytes in memory and never fits the "
                f"{self._config.memory_bytes} for adapters"
            )
        if options.validate_only:
            return self._catalogue.put(adapter_id, version, options)
        with self._versions.changing, ExitStack() as after:
            after.callback(self._versions.sweep, version.digest, version.shared)
            for digest, tensors in encoded.shared.items():
                if not self._blobs.has(digest):
                    self._blobs.write(digest, pack(tensors))
            self._blobs.write(version.digest, encoded.blob)
            if options.pinned or (options.pinned is None and self._catalogue.is_pinned(adapter_id)):
                after.enter_context(self._versions.held(version.digest, version.resident_bytes))
            record = self._catalogue.put(adapter_id, version, options)
            self._versions.follow_pins()
            return record

    def _bound(self, parsed: ParsedAdapter) -> ParsedAdapter:
        """Bound to the base that it was checked against, whatever it says itself: after a restart on another base of the
        same shapes it is refused instead of answering wrongly."""
        return replace(parsed, base_fingerprint=self._base.fingerprint)

    def get(self, adapter_id: str) -> AdapterRecord:
        return self._catalogue.get(check_id(adapter_id))

    def list(self, page_size: int, page_token: str = "") -> tuple[Records, str]:
        """One page by id and the token of the next, "" after the last."""
        size, after = check_page_size(page_size), parse_page_token(page_token)
        records = self._catalogue.page(size + 1, after)
        return records[:size], make_page_token(records[size - 1].id) if len(records) > size else ""

    def update(
        self, adapter_id: str, *, pinned: bool | None = None, labels: Mapping[str, str] | None = None, etag: str = ""
    ) -> AdapterRecord:
        """Changes what is not None. Raises `AdapterNotFound`, `EtagMismatch`, `AdapterMemoryFull` (pinned only)."""
        checked = None if labels is None else check_labels(labels)
        with self._versions.changing, ExitStack() as after:
            self._catalogue.get(check_id(adapter_id), etag)
            if pinned:
                after.enter_context(self._versions.held(*self._catalogue.resolve(adapter_id)))
            record = self._catalogue.update(adapter_id, pinned=pinned, labels=checked, etag=etag)
            self._versions.follow_pins()
            return record

    def delete(self, adapter_id: str, *, etag: str = "") -> None:
        """Forgets an adapter with its versions; leases on them go on. Raises `AdapterNotFound`, `EtagMismatch`."""
        with self._versions.changing:
            freed = self._catalogue.delete(check_id(adapter_id), etag)
            self._versions.follow_pins()
            for digest, shared in freed.items():
                self._versions.sweep(digest, shared)

    def acquire(self, reference: str) -> Lease:
        """A lease on the version that "id" or "id@digest" means now. Raises what `acquire_all` raises."""
        return self._leasing.acquire([Wanted(reference)])

    def acquire_all(self, wanted: Sequence[Wanted]) -> Lease:
        """A lease on the weighted sum of adapters; see `Leasing.acquire`."""
        return self._leasing.acquire(wanted)

    def begin(self, wanted: Sequence[Wanted]) -> Lease | PendingLease:
        """`acquire_all` that waits for no load: what is to be read from disk or added up is left to a `PendingLease`."""
        pending = self._leasing.begin(wanted)
        return pending.finish() if pending.ready else pending

    def residency_state(self, digest: str) -> State:
        return self._versions.residency.state(digest)

    def stats(self) -> StoreStats:
        return self._versions.residency.stats(self._catalogue.count())


def _catalogue_path(blobs: BlobFolder) -> Path:
    path = blobs.root / "catalogue.sqlite3"
    if not path.exists() and any(blobs.digests()):
        # Going on would take every blob for a leftover and remove it.
        raise ConfigError(
            "the store has adapters but its catalogue is missing: restore it or move blobs/ away", field="store"
        )
    return path


def _version(parsed: ParsedAdapter, encoded: Encoded) -> Version:
    return Version(
        digest=encoded.digest,
        family=parsed.family,
        size_bytes=len(encoded.blob),
        resident_bytes=resident_nbytes(parsed.deltas),
        module_count=len(parsed.deltas),
        parameter_count=parsed.parameter_count,
        base_model_name_or_path=parsed.base_model_name_or_path,
        warnings=parsed.warnings,
        basis=parsed.basis,
        shared=tuple(encoded.shared),
    )
