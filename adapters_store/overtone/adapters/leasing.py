"""From what a request asks for to a lease: stored versions, adapters that came with the request, weighted sums of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from overtone.adapters.catalogue import Resolved
from overtone.adapters.catalogue.rows import unknown
from overtone.adapters.files import AdapterFiles
from overtone.adapters.last_used import LastUsed
from overtone.adapters.lease import Lease, Share
from overtone.adapters.lookups import Lookups
from overtone.adapters.pending import Found, PendingLease
from overtone.adapters.recipes import Admitted
from overtone.adapters.records import parse_reference
from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.sums import Sum
from overtone.adapters.versions import Versions
from overtone.errors import AdapterNotFound, OvertoneError

_REMEMBERED_INLINE = 10_000
_TRIES = 5
"""To retain the current version before it is replaced and gone."""


@dataclass(frozen=True)
class Wanted:
    """One adapter of a request: by reference ("id" or "id@digest"), or its files. weight: finite; label: what errors call it
    beside others."""

    reference: str = ""
    files: AdapterFiles | None = None
    weight: float = 1.0
    label: str = ""


class Leasing:
    """Thread-safe. admit: what checks the files of an adapter; tenant_of: whose an id is, None if there is no such id."""

    def __init__(
        self,
        lookups: Lookups[Resolved],
        versions: Versions,
        admit: Callable[[AdapterFiles], Admitted],
        used: LastUsed,
        tenant_of: Callable[[str], str | None],
    ) -> None:
        self._lookups, self._versions, self._admit, self._used = lookups, versions, admit, used
        self._tenant_of = tenant_of
        # SHA-256 of an inline adapter's files -> its digest and bytes in memory.
        self._inline: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease:
        """A lease on the weighted sum of one or more adapters, in memory until released, on behalf of a tenant.

        Raises `AdapterNotFound`, also for what belongs to another tenant, `AdapterMemoryFull`, `StoreCorrupted`,
        `StoreFailed`, `BaseModelMismatch` for a version that was stored for another base model, and `InvalidAdapter` for
        files that are none.
        """
        return self.begin(wanted, tenant).finish()

    def acquire_resident(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease | None:
        """`acquire` for who must not wait, from memory alone: None if anything is to be asked for, loaded or added up.

        Raises `AdapterNotFound` for an id of which it is known that there is none, and `InvalidRequest`.
        """
        shares = []
        for one in wanted:
            with _labelled(one):
                share = self._known(one, tenant)
            if share is None:
                return None
            shares.append(share)
        total = Sum.of(shares)
        # Whoever frees a version tells `Lookups` first, then drops it from memory: what is found in both was not deleted
        # when this began, and is leased now.
        adapter = self._versions.residency.retain_resident(total.key, temporary=total.computed)
        if adapter is None:
            return None
        for share in shares:
            self._used.note(share.adapter_id)
        return Lease(total.shares, adapter, partial(self._versions.release, total.key))

    def _known(self, wanted: Wanted, tenant: str) -> Share | None:
        if wanted.files is not None:
            return None
        adapter_id, prefix = parse_reference(wanted.reference)
        found = self._lookups.peek(adapter_id, prefix)
        return None if found is None else Share(adapter_id, _of_tenant(found, adapter_id, tenant).digest, wanted.weight)

    def begin(self, wanted: Sequence[Wanted], tenant: str = "") -> PendingLease:
        """The first part of `acquire`, which parses what came with the request and waits for no load."""
        assert wanted
        with ExitStack() as parts:
            found = [self._find(one, tenant, parts) for one in wanted]
            pending = PendingLease(self._versions, found)
            pending.retained.push(parts.pop_all())
            return pending

    def _find(self, wanted: Wanted, tenant: str, parts: ExitStack) -> Found:
        """The adapter, retained until `parts` is closed."""
        with _labelled(wanted):
            for _ in range(_TRIES - 1):
                try:
                    return self._retained(wanted, tenant, parts)
                except AdapterNotFound as error:
                    # Who names no version asks for none that has gone meanwhile.
                    if "version" not in error.metadata or "@" in wanted.reference:
                        raise
            return self._retained(wanted, tenant, parts)

    def _retained(self, wanted: Wanted, tenant: str, parts: ExitStack) -> Found:
        found = self._stored(wanted, tenant) if wanted.files is None else self._brought(wanted, wanted.files)
        digest = found.share.digest
        with ExitStack() as retained:
            self._versions.residency.retain(digest, temporary=not found.stored)
            retained.callback(self._versions.release, digest)
            found.check()
            parts.push(retained.pop_all())
        return found

    def _stored(self, wanted: Wanted, tenant: str) -> Found:
        adapter_id, prefix = parse_reference(wanted.reference)
        resolved = self._resolve(adapter_id, prefix, tenant)
        self._used.note(adapter_id)

        def check() -> None:
            """It may have been deleted before it was retained, unless it is still known; after that its blob stays."""
            if self._lookups.peek(adapter_id, prefix) != resolved:
                self._resolve(adapter_id, resolved.digest, tenant)

        return Found(
            Share(adapter_id, resolved.digest, wanted.weight),
            resolved.resident_bytes,
            stored=True,
            load=partial(self._versions.read, resolved.digest),
            check=check,
        )

    def _resolve(self, adapter_id: str, prefix: str, tenant: str) -> Resolved:
        try:
            found = self._lookups.resolve(adapter_id, prefix)
        except OvertoneError:
            # Whatever is wrong with it: who may not know that it is there is told that it is not.
            if self._tenant_of(adapter_id) not in (None, "", tenant):
                raise unknown(adapter_id) from None
            raise
        return _of_tenant(found, adapter_id, tenant)

    def _brought(self, wanted: Wanted, files: AdapterFiles) -> Found:
        """An adapter that is not in the catalogue. Checked like any other, once for the same files while remembered."""
        raw = _raw_digest(files)
        with self._lock:
            known = self._inline.get(raw)
        admitted = None
        if known is None:
            admitted = self._admit(files)
            known = admitted.encoded.digest, admitted.resident_bytes
        with self._lock:
            self._inline[raw] = known
            self._inline.move_to_end(raw)
            while len(self._inline) > _REMEMBERED_INLINE:
                self._inline.popitem(last=False)
        digest, nbytes = known

        def load() -> ResidentAdapter:
            adapter = admitted or self._admit(files)
            return self._versions.made(digest, adapter.kind.family, adapter.contents, "memory")

        return Found(Share("", digest, wanted.weight), nbytes, stored=False, load=load)


def _of_tenant(resolved: Resolved, adapter_id: str, tenant: str) -> Resolved:
    """Nobody learns what others have: raises `AdapterNotFound` as for an id that there is not."""
    if resolved.tenant not in ("", tenant):
        raise unknown(adapter_id)
    return resolved


@contextmanager
def _labelled(wanted: Wanted) -> Iterator[None]:
    """Errors inside say which of several adapters it was."""
    try:
        yield
    except OvertoneError as error:
        if wanted.label:
            error.metadata["source"] = wanted.label
            error.message = f"{wanted.label}: {error.message}"
        raise


def _raw_digest(files: AdapterFiles) -> str:
    digest = hashlib.sha256()
    for part in (files.layout.config.encode(), files.config, files.weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
