"""What `Residency` does, with everything computed anew from plain facts; one load after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

HALF_LIFE, LEAST_HALF_LIFE = 8, 1024
LEAST_S, MOST_S = 1e-4, 10.0


@dataclass
class Slot:
    leases: int = 0
    nbytes: int = 0
    resident: bool = False
    loading: bool = False
    temporary: bool = False
    shared: Mapping[str, int] = field(default_factory=dict)
    frequency: float = 0.0
    used: int = 0
    worth: float = 0.0
    priority: float = 0.0
    idle_since: int = 0


class SlowResidency:
    """`load` is in two parts: `begin` says whether there is anything to load, `finish` ends it. Both say False for what does
    not fit."""

    def __init__(self, budget: int, overhead: int) -> None:
        self.budget, self.overhead = budget, overhead
        self.slots: dict[str, Slot] = {}
        self.pinned: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.usual: dict[str, float] = {}
        self.uses = self.changes = self.evictions = self.hits = self.misses = 0
        self.clock = 0.0

    def idle(self) -> list[str]:
        """What may be evicted, in the order in which it goes."""
        free = [d for d, s in self.slots.items() if s.resident and not s.leases and d not in self.pinned]

        def order(digest: str) -> tuple[bool, float, int]:
            slot = self.slots[digest]
            return (False, 0.0, slot.idle_since) if slot.temporary else (True, slot.priority, slot.used)

        return sorted(free, key=order)

    @property
    def used(self) -> int:
        self._forget_shared()
        return sum(slot.nbytes for slot in self.slots.values()) + sum(self.sizes.values())

    def _forget_shared(self) -> None:
        in_use = {key for slot in self.slots.values() if slot.resident for key in slot.shared}
        self.sizes = {key: size for key, size in self.sizes.items() if key in in_use}

    def retain(self, digest: str, temporary: bool) -> None:
        slot = self.slots.setdefault(digest, Slot(temporary=temporary))
        slot.leases += 1
        slot.temporary &= temporary

    def retain_resident(self, digest: str, temporary: bool) -> bool:
        if digest not in self.slots or not self.slots[digest].resident:
            return False
        self.retain(digest, temporary)
        self.hits += 1
        self.use(self.slots[digest])
        return True

    def release(self, digest: str) -> None:
        slot = self.slots[digest]
        slot.leases -= 1
        self.changes += 1
        slot.idle_since = self.changes
        if not slot.leases and not slot.resident and not slot.loading:
            del self.slots[digest]

    def toggle_pin(self, digest: str) -> None:
        self.pinned ^= {digest}
        if digest in self.slots and not self.slots[digest].leases:
            self.changes += 1
            self.slots[digest].idle_since = self.changes

    def use(self, slot: Slot) -> None:
        self.uses += 1
        stored = sum(not self.slots[digest].temporary for digest in self.idle())
        slot.frequency = 1.0 + slot.frequency * 2.0 ** (
            (slot.used - self.uses) / (HALF_LIFE * stored + LEAST_HALF_LIFE)
        )
        slot.used = self.uses
        slot.priority = max(slot.priority, self.clock + slot.frequency * slot.worth)

    def begin(self, digest: str, nbytes: int) -> bool:
        """A load of what is neither there nor on its way."""
        slot = self.slots[digest]
        self.misses += 1
        self.use(slot)
        if not self.make_room(self.used + nbytes + self.overhead - self.budget):
            return False
        slot.nbytes, slot.loading = nbytes + self.overhead, True
        return True

    def finish(self, digest: str, nbytes: int, shared: Mapping[str, int], seconds: float, source: str) -> bool:
        seconds = min(max(seconds, LEAST_S), MOST_S)
        usual = self.usual.get(source, seconds)
        self.usual[source] = usual + (seconds - usual) * (1 / 16)
        slot = self.slots[digest]
        slot.loading = False
        if not self.keep(slot, nbytes, shared, (seconds + usual) / 2):
            slot.nbytes = 0
            return False
        return True

    def fail(self, digest: str) -> None:
        self.slots[digest].loading, self.slots[digest].nbytes = False, 0

    def insert(self, digest: str, nbytes: int, shared: Mapping[str, int]) -> bool:
        slot = self.slots.get(digest, Slot())
        if slot.resident or slot.loading:
            return slot.resident
        self.use(slot)
        before = digest in self.slots
        self.slots[digest] = slot
        slot.leases += 1  # it does not go for itself
        kept = self.keep(slot, nbytes, shared, self.usual.get("disk", LEAST_S))
        slot.leases -= 1
        if not kept and not before:
            del self.slots[digest]
        return kept

    def keep(self, slot: Slot, nbytes: int, shared: Mapping[str, int], cost: float) -> bool:
        admitted, sizes = slot.nbytes, dict(self.sizes)
        slot.nbytes, slot.shared, slot.resident = nbytes + self.overhead, shared, True
        for key, size in shared.items():
            self.sizes[key] = max(size, self.sizes.get(key, 0))
        if not self.make_room(self.used - self.budget):
            slot.nbytes, slot.shared, slot.resident, self.sizes = admitted, {}, False, sizes
            return False
        slot.worth = cost / max(1, slot.nbytes)
        slot.priority = max(slot.priority, self.clock + slot.frequency * slot.worth)
        return True

    def make_room(self, missing: int) -> bool:
        users = Counter(key for slot in self.slots.values() if slot.resident for key in slot.shared)
        going: list[str] = []
        freed, order = 0, self.idle()
        while freed < missing:
            if not order:
                return False
            going.append(order.pop(0))
            leaving = Counter(key for digest in going for key in self.slots[digest].shared)
            freed = sum(self.slots[digest].nbytes for digest in going)
            freed += sum(self.sizes[key] for key, count in leaving.items() if count == users[key])
        for digest in going:
            slot = self.slots.pop(digest)
            if not slot.temporary:
                self.clock = max(self.clock, slot.priority)
        self.evictions += len(going)
        return True

    def drop(self, digest: str) -> bool:
        if digest in self.slots and self.slots[digest].leases:
            return False
        self.slots.pop(digest, None)
        return True
