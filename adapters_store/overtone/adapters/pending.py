"""A lease that may have to wait: its adapters are known and retained, not all of them are in memory yet."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from overtone.adapters.lease import Lease, Share
from overtone.adapters.resident import ResidentAdapter, mix
from overtone.adapters.versions import Versions
from overtone.errors import AdapterMemoryFull


@dataclass(frozen=True)
class Found:
    """An adapter that is known by its digest. stored: `load` reads it from disk, else it came with the request. check:
    raises if it has vanished before it was retained."""

    share: Share
    nbytes: int
    stored: bool
    load: Callable[[], ResidentAdapter]
    check: Callable[[], object] = lambda: None


class PendingLease:
    """`finish` or `release` must be called, once. retained: closed then; lets go of the adapters that were found."""

    def __init__(self, versions: Versions, found: Sequence[Found]) -> None:
        """Raises `AdapterMemoryFull` for a sum that never fits."""
        self._versions = versions
        self.retained = ExitStack()
        ordered = sorted(found, key=lambda one: (one.share.digest, one.share.adapter_id, one.share.weight))
        self._shares = tuple(one.share for one in ordered)
        self._found = {one.share.digest: one for one in ordered}
        self._weights = {
            digest: math.fsum(s.weight for s in self._shares if s.digest == digest) for digest in self._found
        }
        nbytes = sum(one.nbytes for one in self._found.values())
        if self.mixes and 2 * nbytes > versions.residency.budget:
            message = f"the adapters together need {nbytes} bytes, and as much again while they are added"
            raise AdapterMemoryFull(f"{message}: more than the {versions.residency.budget} for adapters")
        self._nbytes = nbytes

    @property
    def mixes(self) -> bool:
        """Whether it is a sum or a multiple, which is computed, not one adapter as it is."""
        return len(self._shares) > 1 or self._shares[0].weight != 1

    @property
    def ready(self) -> bool:
        """Whether `finish` would neither read the disk nor compute."""
        key = self._key if self.mixes else self._shares[0].digest
        return self._versions.residency.state(key) == "resident"

    @property
    def missing(self) -> Mapping[str, Callable[[], None]]:
        """Digest -> what brings it into memory, for all that would be waited for: on the disk, or on their way already. Good
        to call even once this lease has been released."""
        states = {digest: self._versions.residency.state(digest) for digest in self._found}
        return {
            digest: partial(self._bring, one)
            for digest, one in self._found.items()
            if states[digest] == "loading" or (one.stored and states[digest] != "resident")
        }

    def _bring(self, one: Found) -> None:
        self._versions.residency.retain(one.share.digest, temporary=not one.stored)
        try:
            self._load(one)
        finally:
            self._versions.release(one.share.digest)

    def finish(self) -> Lease:
        """Loads what is missing and adds what is to be added. Raises what `Leasing.acquire` raises."""
        with self.retained as parts:
            if not self.mixes:
                adapter = self._load(next(iter(self._found.values())))
                return Lease(self._shares, adapter, parts.pop_all().close)
            return self._mixed()

    def release(self) -> None:
        """Gives up."""
        self.retained.close()

    @property
    def _key(self) -> str:
        return "mix:" + hashlib.sha256(json.dumps(sorted(self._weights.items())).encode()).hexdigest()

    def _mixed(self) -> Lease:
        """Keeps the sum in memory; its parts only until it is made."""
        key, residency = self._key, self._versions.residency
        with ExitStack() as held:
            residency.retain(key, temporary=True)
            held.callback(self._versions.release, key)
            adapter = residency.load(
                key,
                self._nbytes,
                lambda: mix(key, [(self._weights[d], self._load(self._found[d])) for d in sorted(self._found)]),
            )
            return Lease(self._shares, adapter, held.pop_all().close)

    def _load(self, found: Found) -> ResidentAdapter:
        return self._versions.residency.load(found.share.digest, found.nbytes, found.load)
