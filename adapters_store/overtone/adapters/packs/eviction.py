"""Keeps the bytes on the disk below a budget: what object storage safely has goes, the least recently used first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.remote import Remote

_AT_ONCE = 1024
"""Candidates of one round, so that a million own files are not a million candidates in memory."""


@dataclass(frozen=True, slots=True, order=True)
class _Candidate:
    used: float
    """When it was last read or written, in seconds."""
    size: int
    pack: int
    digest: str


_STEP = 64
"""Where nothing may go, all is counted again after a growth by this part of the budget."""


class Budget:
    """Bytes that may be on the disk; 0: any number. Thread-safe. Counting them all is left until they may be too many."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._lock = threading.Lock()
        self._room, self._grown = -1, 0

    def grew(self, nbytes: int) -> None:
        with self._lock:
            self._room -= nbytes
            self._grown += nbytes

    def counted(self, total: int) -> None:
        with self._lock:
            self._room, self._grown = self.nbytes - total, 0

    @property
    def pressing(self) -> bool:
        """Whether it is worth a look now, and not only when there is more to go."""
        return self.doubtful and self._grown * _STEP > self.nbytes

    @property
    def doubtful(self) -> bool:
        """Whether the bytes may be too many now."""
        return self.nbytes > 0 and self._room < 0


class Evictor:
    """Used by one thread at a time. Raises `StoreFailed`; then call again later."""

    def __init__(self, parts: Parts, remote: Remote) -> None:
        self._parts, self._remote = parts, remote
        self.evicted = 0

    def trim(self, budget: Budget, changed: Callable[[list[str]], None]) -> None:
        """Until the bytes on the disk are within the budget or nothing more may go. changed: told of own files that turn
        out not to be safe, to be uploaded again."""
        with self._parts.removing:
            while budget.doubtful:
                with operation("count the bytes of the adapter store"):
                    total, chosen = self._look()
                before = total
                for candidate in chosen:
                    if total > budget.nbytes:
                        total -= self._evict(candidate, changed)
                budget.counted(total)
                if total == before:
                    return

    def _look(self) -> tuple[int, list[_Candidate]]:
        """The bytes on the disk, and what may go."""
        total = 0

        def counted() -> Iterator[_Candidate]:
            nonlocal total
            for candidate, movable in self._all():
                total += candidate.size
                if movable:
                    yield candidate

        chosen = heapq.nsmallest(_AT_ONCE, counted())
        return total, chosen

    def _all(self) -> Iterator[tuple[_Candidate, bool]]:
        ends = {facts.number: facts.end for facts in self._parts.index.packs()}
        for number, end in ends.items():
            # A pack may go between the question and the answer.
            with suppress(FileNotFoundError):
                facts = self._parts.folder.pack(number).stat()
                stored = self._parts.ledger.get(number)
                safe = stored is not None and stored.size == end and not self._parts.writer.holds(number)
                used = self._parts.local.used.get(number, facts.st_mtime)
                yield _Candidate(used, facts.st_size, number, ""), safe
        for path, digest in self._parts.own.files():
            with suppress(FileNotFoundError):
                facts = path.stat()
                yield _Candidate(facts.st_mtime, facts.st_size, 0, digest or ""), digest is not None

    def _evict(self, candidate: _Candidate, changed: Callable[[list[str]], None]) -> int:
        """The bytes that are free now: 0 if the other side does not have them as it should."""
        if candidate.digest:
            there = self._remote.head(self._parts.ledger.blob_name(candidate.digest))
            lost = self._parts.ledger.is_lost(candidate.digest)
            if lost or there is None or there.size != candidate.size:
                changed([candidate.digest])
                return 0
            with operation("evict an adapter"):
                self._parts.own.remove(candidate.digest)
        else:
            if self._remote.head(self._parts.ledger.pack_name(candidate.pack)) != self._parts.ledger.get(
                candidate.pack
            ):
                self._parts.ledger.remove(candidate.pack)
                return 0
            with operation("evict a pack"):
                disk.unlink(self._parts.folder.pack(candidate.pack))
            self._parts.handles.forget(candidate.pack)
        self.evicted += 1
        return candidate.size
