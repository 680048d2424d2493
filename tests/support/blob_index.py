"""A catalogue of blobs in memory: what the packs ask of the real one, and all that they may rely on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from overtone.adapters.packs import OWN_FILE, Leaving, PackFacts, Place


class MemoryIndex:
    """Outlives the `Blobs` that use it, as a database does. `before_commit`: called before any change takes effect."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.before_commit: Callable[[], None] = lambda: None
        self._ends: dict[int, int] = {}
        self._lock = threading.RLock()

    def commit(self, places: Mapping[str, Place]) -> None:
        with self._lock:
            self.before_commit()
            self._put(places)

    def _put(self, places: Mapping[str, Place]) -> None:
        for digest, place in places.items():
            self.places[digest] = place
            if place.pack != OWN_FILE:
                self._ends[place.pack] = max(place.end, self._ends.get(place.pack, 0))

    def place_of(self, digest: str) -> Place | None:
        return self.places.get(digest)

    def packs(self) -> Sequence[PackFacts]:
        with self._lock:
            held = {number: [p.length for p in self.places.values() if p.pack == number] for number in self._ends}
            return [PackFacts(n, self._ends[n], sum(lengths), len(lengths)) for n, lengths in held.items()]

    def live_in(self, pack: int, after_offset: int, limit: int) -> Sequence[tuple[str, Place]]:
        with self._lock:
            found = [(d, p) for d, p in self.places.items() if p.pack == pack and p.offset > after_offset]
        return sorted(found, key=lambda item: item[1].offset)[:limit]

    def own_files(self, after: str, limit: int) -> Sequence[tuple[str, Place]]:
        with self._lock:
            found = [(d, p) for d, p in self.places.items() if p.pack == OWN_FILE and d > after]
        return sorted(found, key=lambda item: item[0])[:limit]

    def move(self, moves: Sequence[tuple[str, Place, Place]]) -> None:
        with self._lock:
            self.before_commit()
            self._put({digest: new for digest, old, new in moves if self.places.get(digest) == old})

    def release(self, digests: Sequence[str], before_commit: Leaving) -> Sequence[tuple[str, Place]]:
        with self._lock:
            left = [(digest, self.places[digest]) for digest in digests if digest in self.places]
            before_commit(left)
            self.before_commit()
            for digest, _ in left:
                del self.places[digest]
            return left

    def drop_pack(self, number: int) -> bool:
        with self._lock:
            self.before_commit()
            if any(place.pack == number for place in self.places.values()):
                return False
            self._ends.pop(number, None)
            return True
