"""From what a request asks for to a lease: stored versions, adapters that came with the request, weighted sums of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from overtone.adapters.blob import encode
from overtone.adapters.catalogue import Catalogue
from overtone.adapters.families import ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.files import AdapterFiles
from overtone.adapters.lease import Lease, Share
from overtone.adapters.pending import Found, PendingLease
from overtone.adapters.records import parse_reference
from overtone.adapters.resident import ResidentAdapter, make_resident, resident_nbytes
from overtone.adapters.versions import Versions
from overtone.errors import OvertoneError

_REMEMBERED_INLINE = 10_000


@dataclass(frozen=True)
class Wanted:
    """One adapter of a request: by reference ("id" or "id@digest"), or its files. weight: finite; label: what errors call it
    beside others."""

    reference: str = ""
    files: AdapterFiles | None = None
    weight: float = 1.0
    label: str = ""


class Leasing:
    """Thread-safe."""

    def __init__(self, catalogue: Catalogue, versions: Versions, context: ParserContext, *, strict_base: bool) -> None:
        self._catalogue, self._versions = catalogue, versions
        self._context, self._strict_base = context, strict_base
        # SHA-256 of an inline adapter's files -> its digest and bytes in memory.
        self._inline: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, wanted: Sequence[Wanted]) -> Lease:
        """A lease on the weighted sum of one or more adapters, in memory until released.

        Raises `AdapterNotFound`, `AdapterMemoryFull`, `StoreCorrupted`, `StoreFailed`, `BaseModelMismatch` for a version
        that was stored for another base model, and `InvalidAdapter` for files that are none.
        """
        return self.begin(wanted).finish()

    def begin(self, wanted: Sequence[Wanted]) -> PendingLease:
        """The first part of `acquire`, which parses what came with the request and waits for no load."""
        assert wanted
        with ExitStack() as parts:
            found = [self._find(one, parts) for one in wanted]
            pending = PendingLease(self._versions, found)
            pending.retained.push(parts.pop_all())
            return pending

    def _find(self, wanted: Wanted, parts: ExitStack) -> Found:
        """The adapter, retained until `parts` is closed."""
        try:
            return self._retain(wanted, parts)
        except OvertoneError as error:
            if wanted.label:
                error.metadata["source"] = wanted.label
                error.message = f"{wanted.label}: {error.message}"
            raise

    def _retain(self, wanted: Wanted, parts: ExitStack) -> Found:
        found = self._stored(wanted) if wanted.files is None else self._brought(wanted, wanted.files)
        digest = found.share.digest
        self._versions.residency.retain(digest, temporary=not found.stored)
        parts.callback(self._versions.release, digest)
        found.check()
        return found

    def _stored(self, wanted: Wanted) -> Found:
        adapter_id, prefix = parse_reference(wanted.reference)
        digest, nbytes = self._catalogue.resolve(adapter_id, prefix)
        return Found(
            Share(adapter_id, digest, wanted.weight),
            nbytes,
            stored=True,
            load=partial(self._versions.read, digest),
            # It may have been deleted before it was retained; after that its blob stays.
            check=partial(self._catalogue.resolve, adapter_id, digest),
        )

    def _brought(self, wanted: Wanted, files: AdapterFiles) -> Found:
        """An adapter that is not in the catalogue. Checked like any other, once for the same files while remembered."""
        raw = _raw_digest(files)
        with self._lock:
            known = self._inline.get(raw)
        parsed = None
        if known is None:
            parsed = self._parse(files)
            digest = encode(replace(parsed, base_fingerprint=self._context.base.fingerprint)).digest
            known = digest, resident_nbytes(parsed.deltas)
        with self._lock:
            self._inline[raw] = known
            self._inline.move_to_end(raw)
            while len(self._inline) > _REMEMBERED_INLINE:
                self._inline.popitem(last=False)
        digest, nbytes = known

        def load() -> ResidentAdapter:
            adapter = parsed or self._parse(files)
            return make_resident(digest, adapter.family, adapter.deltas, self._versions.on_device, "memory")

        return Found(Share("", digest, wanted.weight), nbytes, stored=False, load=load)

    def _parse(self, files: AdapterFiles) -> ParsedAdapter:
        return parse_adapter(files, self._context, strict_base=self._strict_base)


def _raw_digest(files: AdapterFiles) -> str:
    digest = hashlib.sha256()
    for part in (files.layout.config.encode(), files.config, files.weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
