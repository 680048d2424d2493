"""A lease that may have to wait: its adapters are known and retained, not all of them are in memory yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from overtone.adapters.lease import Lease, Share
from overtone.adapters.resident import ResidentAdapter, mix
from overtone.adapters.sums import Sum
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
        # Of equal contents the one that is stored, if one is.
        self._found = {one.share.digest: one for one in sorted(found, key=lambda one: one.stored)}
        self._sum = Sum.of(one.share for one in found)
        self._absent = {digest for digest in self._found if versions.residency.state(digest) != "resident"}
        nbytes = sum(one.nbytes for one in self._found.values())
        if self.mixes and 2 * nbytes > versions.residency.budget:
            message = f"the adapters together need {nbytes} bytes, and as much again while they are added"
            raise AdapterMemoryFull(f"{message}: more than the {versions.residency.budget} for adapters")
        self._nbytes = nbytes

    @property
    def mixes(self) -> bool:
        """Whether it is to be computed."""
        return self._sum.computed

    @property
    def ready(self) -> bool:
        """Whether `finish` would neither read the disk nor compute."""
        return self._versions.residency.state(self._sum.key) == "resident"

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
            self._versions.residency.bring(one.share.digest, one.nbytes, one.load)
        finally:
            self._versions.release(one.share.digest)

    def finish(self) -> Lease:
        """Loads what is missing and adds what is to be added. Raises what `Leasing.acquire` raises."""
        with self.retained as parts:
            if not self.mixes:
                adapter = self._load(next(iter(self._found.values())))
                return Lease(self._sum.shares, adapter, parts.pop_all().close)
            return self._mixed()

    def release(self) -> None:
        """Gives up."""
        self.retained.close()

    def _mixed(self) -> Lease:
        """Keeps the sum in memory; its parts only until it is made."""
        key, residency = self._sum.key, self._versions.residency
        weights = self._sum.weights
        with ExitStack() as held:
            residency.retain(key, temporary=True)
            held.callback(self._versions.release, key)
            adapter = residency.load(
                key,
                self._nbytes,
                lambda: mix(key, [(weights[digest], self._load(one)) for digest, one in sorted(self._found.items())]),
            )
            return Lease(self._sum.shares, adapter, held.pop_all().close)

    def _load(self, found: Found) -> ResidentAdapter:
        digest = found.share.digest
        return self._versions.residency.load(digest, found.nbytes, found.load, waited=digest in self._absent)
