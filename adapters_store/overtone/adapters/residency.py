"""Adapters in memory: loaded once however many ask, evicted least recently used first, never while in use.

Knows digests and sizes; what a load does is its caller's function.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch

from overtone.adapters.records import StoreStats
from overtone.errors import AdapterMemoryFull
from overtone.kernels import CsrCore, Delta, FrameKind, compress

State = Literal["stored", "loading", "resident"]
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class ResidentDelta:
    """A `Delta` ready to be applied."""

    analysis: FrameKind
    core: CsrCore
    synthesis: FrameKind


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """One version in memory; equal only to itself. `nbytes`: of all its cores."""

    digest: str
    family: str
    deltas: Mapping[str, ResidentDelta]
    nbytes: int


def make_resident(
    digest: str, family: str, deltas: Mapping[str, Delta], device: torch.device | None = None
) -> ResidentAdapter:
    """`deltas` in the form that the engine applies, in the memory of `device`."""
    ready = {name: ResidentDelta(d.analysis, compress(d.core, device), d.synthesis) for name, d in deltas.items()}
    return ResidentAdapter(digest, family, ready, sum(d.core.nbytes for d in ready.values()))


@dataclass
class _Entry:
    """`nbytes` is counted from the moment that a load is admitted; `adapter` and `loading` are never both set."""

    leases: int = 0
    nbytes: int = 0
    adapter: ResidentAdapter | None = None
    loading: Future[ResidentAdapter] | None = None


class Residency:
    """Thread-safe. `retain` before `load`, `release` after use: an entry without a lease may vanish at any time."""

    def __init__(self, budget: int, loader: Callable[[str], ResidentAdapter]) -> None:
        self._budget = budget
        self._loader = loader
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._used = self._loads = self._failures = self._hits = self._evictions = 0

    def retain(self, digest: str) -> None:
        with self._lock:
            self._entries.setdefault(digest, _Entry()).leases += 1

    def release(self, digest: str) -> None:
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            entry.leases -= 1
            self._entries.move_to_end(digest)
            if entry.leases == 0 and entry.adapter is None and entry.loading is None:
                del self._entries[digest]

    def load(self, digest: str, nbytes: int) -> ResidentAdapter:
        """The adapter of a retained digest, from memory or through the loader. nbytes: what it will take, as far as known.

        Raises `AdapterMemoryFull`, and whatever the loader raises, to all who wait for this load; the next call tries
        again.
        """
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            self._entries.move_to_end(digest)
            if entry.adapter is not None:
                self._hits += 1
                return entry.adapter
            ours = entry.loading is None
            if ours:
                self._admit(nbytes)
                entry.nbytes, entry.loading = nbytes, Future()
            loading = entry.loading
        assert loading is not None
        if ours:
            self._run(digest, entry, loading)
        return loading.result()

    def _run(self, digest: str, entry: _Entry, loading: Future[ResidentAdapter]) -> None:
        try:
            adapter = self._loader(digest)
        except BaseException as error:
            with self._lock:
                self._failures += 1
                self._used -= entry.nbytes
                entry.nbytes, entry.loading = 0, None
            loading.set_exception(error)
        else:
            with self._lock:
                self._loads += 1
                self._used += adapter.nbytes - entry.nbytes
                entry.nbytes, entry.adapter, entry.loading = adapter.nbytes, adapter, None
            loading.set_result(adapter)

    def _admit(self, nbytes: int) -> None:
        """Counts `nbytes` as used, evicting the least recently used as far as needed, or evicts nothing and raises."""
        if nbytes > self._budget:
            message = f"the adapter needs {nbytes} bytes and never fits the {self._budget} bytes for adapters"
            raise AdapterMemoryFull(message)
        missing = self._used + nbytes - self._budget
        victims = []
        for digest, entry in self._entries.items():
            if missing <= 0:
                break
            if entry.adapter is not None and entry.leases == 0 and digest not in self._pinned:
                victims.append(digest)
                missing -= entry.nbytes
        if missing > 0:
            message = f"all of the {self._budget} bytes for adapters are in use or pinned; {nbytes} more are needed"
            raise AdapterMemoryFull(message, retry_after_s=_RETRY_AFTER_S)
        for digest in victims:
            self._used -= self._entries.pop(digest).nbytes
        self._evictions += len(victims)
        self._used += nbytes

    def set_pinned(self, digests: Set[str]) -> None:
        """From now on exactly these stay in memory once they are there."""
        with self._lock:
            self._pinned = frozenset(digests)

    def drop(self, digest: str) -> bool:
        """Frees a digest that nothing leases; False if something does."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None and entry.leases > 0:
                return False
            if entry is not None:
                self._used -= self._entries.pop(digest).nbytes
            return True

    def state(self, digest: str) -> State:
        with self._lock:
            entry = self._entries.get(digest, _Entry())
            return "resident" if entry.adapter is not None else "loading" if entry.loading is not None else "stored"

    def stats(self, registered_count: int) -> StoreStats:
        with self._lock:
            entries = self._entries.values()
            return StoreStats(
                registered_count=registered_count,
                resident_count=sum(entry.adapter is not None for entry in entries),
                resident_bytes=self._used,
                memory_bytes=self._budget,
                leased_count=sum(entry.leases > 0 for entry in entries),
                load_count=self._loads,
                load_failure_count=self._failures,
                hit_count=self._hits,
                eviction_count=self._evictions,
            )
