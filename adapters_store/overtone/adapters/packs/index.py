"""What the packs ask of the catalogue. It alone says which blobs there are: bytes that it does not know are garbage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from overtone.adapters.packs.place import HEADER_BYTES, Place

Leaving = Callable[[Sequence[tuple[str, Place]]], None]
"""Told (digest, place) of what a transaction is about to forget."""


@dataclass(frozen=True, slots=True)
class PackFacts:
    """`end`: the largest `Place.end` ever committed; `live_bytes`: of the `live_count` blobs that are still there."""

    number: int
    end: int
    live_bytes: int
    live_count: int

    @property
    def alive(self) -> float:
        """The part of the pack that is not garbage, between 0 and 1; padding counts as garbage."""
        return (self.live_bytes + self.live_count * HEADER_BYTES) / self.end if self.end else 0.0


class BlobIndex(Protocol):
    """Thread-safe. Every change is one durable transaction; each method may raise `StoreFailed`.

    Committing a blob at a `Place` replaces the place that its digest had and raises its pack's `end` to `Place.end`.
    """

    def place_of(self, digest: str) -> Place | None: ...

    def packs(self) -> Sequence[PackFacts]:
        """All packs in which a blob was ever committed and that were not dropped; none for blobs in own files."""

    def live_in(self, pack: int, after_offset: int, limit: int) -> Sequence[tuple[str, Place]]:
        """The first `limit` blobs with offsets above `after_offset`, in their order; -1 begins at the beginning."""

    def own_files(self, after: str, limit: int) -> Sequence[tuple[str, Place]]:
        """The first `limit` blobs in own files with digests above `after`, in their order; "" begins at the beginning."""

    def move(self, moves: Sequence[tuple[str, Place, Place]]) -> None:
        """(digest, old place, new place): changes those that are still at the old one."""

    def release(self, digests: Sequence[str], before_commit: Leaving) -> Sequence[tuple[str, Place]]:
        """Forgets those that nothing refers to, with what only they refer to, and returns what left.

        Calls `before_commit` with the same inside the transaction, and forgets nothing if it raises.
        """

    def drop_pack(self, number: int) -> bool:
        """Forgets a pack if no blob is left in it; whether it did."""
