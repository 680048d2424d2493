"""Leases for the event loop: an adapter that is slow to come holds up nobody but those who want it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from overtone.adapters.pending import PendingLease
from overtone.adapters.store import AdapterStore, Lease, Wanted
from overtone.api.threads import run_abandonable


class Ahead:
    """A lease that is on its way. As a context manager: left with an error, it is given up or given back, however far it has
    come; else it is the caller's."""

    def __init__(self, coming: asyncio.Task[Lease] | None, releases: Executor) -> None:
        self._coming, self._releases = coming, releases

    async def lease(self) -> Lease | None:
        """Raises what `Leases.acquire` raises."""
        return None if self._coming is None else await self._coming

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._coming is not None and error is not None:
            self._coming.cancel()
            self._coming.add_done_callback(self._give_back)

    def _give_back(self, done: asyncio.Task[Lease]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._releases.submit(done.result().release)


class Leases:
    """What is in memory, and was looked up before, is leased on the spot; what has to be looked up, on threads that never
    wait for a load. What is not in memory is fetched on others, `fetches` at once and never more than one for the same
    version, however many requests want it, come again, or have gone away. What came with a request is parsed, and sums are
    made, on threads of their own. Methods are for the event loop."""

    def __init__(self, store: AdapterStore, fetches: int, on_thread_start: Callable[[], None] | None) -> None:
        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            return ThreadPoolExecutor(threads, f"overtone-{name}", on_thread_start)

        self._store = store
        self._ready, self._fetch, self._compute = pool(2, "leases"), pool(fetches, "fetches"), pool(2, "inline")
        # May delete files, and may wait for whoever changes the catalogue.
        self._release = pool(1, "releases")
        self._fetching: dict[str, asyncio.Future[None]] = {}

    @property
    def releases(self) -> Executor:
        """Where leases are to be released."""
        return self._release

    async def acquire(self, wanted: Sequence[Wanted], tenant: str = "") -> Lease:
        """On behalf of a tenant. Raises what `AdapterStore.acquire_all` raises."""
        resident = self._store.acquire_resident(wanted, tenant)
        if resident is not None:
            return resident
        brought = any(one.files is not None for one in wanted)
        begin = partial(self._store.begin, wanted, tenant)
        begun = await run_abandonable(self._compute if brought else self._ready, begin, _release)
        if isinstance(begun, Lease):
            return begun
        try:
            for flight in [self._fetch_once(digest, bring) for digest, bring in begun.missing.items()]:
                await asyncio.shield(flight)
        except BaseException:
            self._release.submit(begun.release)
            raise
        threads = self._compute if brought or begun.mixes else self._ready
        return await run_abandonable(threads, begun.finish, Lease.release)

    def ahead(self, wanted: Sequence[Wanted], tenant: str = "") -> Ahead:
        """Begins to `acquire`, beside what else a request needs; nothing for none."""
        return Ahead(asyncio.create_task(self.acquire(wanted, tenant)) if wanted else None, self._release)

    def _fetch_once(self, digest: str, bring: Callable[[], None]) -> asyncio.Future[None]:
        flight = self._fetching.get(digest)
        if flight is None:
            flight = self._fetching[digest] = asyncio.get_running_loop().run_in_executor(self._fetch, bring)

            def landed(done: asyncio.Future[None]) -> None:
                del self._fetching[digest]
                if not done.cancelled():
                    done.exception()  # all who wanted it may be gone

            flight.add_done_callback(landed)
        return flight

    def close(self) -> None:
        """Blocks until all is done."""
        for pool in (self._ready, self._fetch, self._compute, self._release):
            pool.shutdown()


def _release(begun: Lease | PendingLease) -> None:
    begun.release()
