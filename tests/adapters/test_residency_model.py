"""Residency against a slow twin: any order of uses, loads that take their time, pins, insertions and removals."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overtone.adapters.residency import Residency
from overtone.adapters.resident import ResidentAdapter, Source
from overtone.errors import AdapterMemoryFull, StoreFailed
from support.slow_residency import SlowResidency

BUDGET, OVERHEAD = 100, 3
DIGESTS = "abcdef"
SHARED: Mapping[str, Mapping[str, int]] = {"a": {"x": 20}, "b": {"x": 25, "y": 9}, "c": {"y": 9}}

digests = st.sampled_from(DIGESTS)
sizes = st.integers(1, 60)


@dataclass
class Flight:
    """A load under way, with all who wait for it. Nothing else runs while the machine waits for it to get somewhere."""

    started: float
    entered: threading.Event = field(default_factory=threading.Event)
    landed: threading.Event = field(default_factory=threading.Event)
    result: ResidentAdapter | None = None
    waiters: list[threading.Thread] = field(default_factory=list)
    got: list[ResidentAdapter | Exception] = field(default_factory=list)

    def load(self) -> ResidentAdapter:
        self.entered.set()
        assert self.landed.wait(60)
        if self.result is None:
            raise StoreFailed("no disk")
        return self.result


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.fast = Residency(BUDGET, overhead=OVERHEAD, clock=lambda: self.now)
        self.slow = SlowResidency(BUDGET, OVERHEAD)
        self.leases: Counter[str] = Counter()
        self.flights: dict[str, Flight] = {}

    def teardown(self) -> None:
        for flight in self.flights.values():
            flight.landed.set()
            for thread in flight.waiters:
                thread.join()

    @rule(digest=digests, temporary=st.booleans())
    def retain(self, digest: str, temporary: bool) -> None:
        self.fast.retain(digest, temporary=temporary)
        self.slow.retain(digest, temporary)
        self.leases[digest] += 1

    @rule(digest=digests, temporary=st.booleans())
    def retain_resident(self, digest: str, temporary: bool) -> None:
        adapter = self.fast.retain_resident(digest, temporary=temporary)
        assert (adapter is not None) is self.slow.retain_resident(digest, temporary)
        self.leases[digest] += adapter is not None

    @precondition(lambda self: any(self.free_to_release()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.free_to_release()))
        self.fast.release(digest)
        self.slow.release(digest)
        self.leases[digest] -= 1

    def free_to_release(self) -> list[str]:
        """Whoever loads or waits for a load keeps a lease."""
        waiting = {digest: len(flight.waiters) for digest, flight in self.flights.items()}
        return [digest for digest in DIGESTS if self.leases[digest] > waiting.get(digest, 0)]

    @precondition(lambda self: any(self.free_to_release()))
    @rule(data=st.data(), nbytes=sizes)
    def load(self, data: st.DataObject, nbytes: int) -> None:
        digest = data.draw(st.sampled_from(self.free_to_release()))
        slot = self.slow.slots[digest]
        if slot.resident:
            assert self.fast.load(digest, nbytes, lambda: 1 / 0).digest == digest  # type: ignore[arg-type, return-value]
            self.slow.hits += 1
            self.slow.use(slot)
        elif slot.loading:
            self.wait_for(digest, self.flights[digest], nbytes)
            self.slow.misses += 1
            self.slow.use(slot)
        elif self.slow.begin(digest, nbytes):
            flight = self.flights[digest] = Flight(self.now)
            self.wait_for(digest, flight, nbytes)
            assert flight.entered.wait(10)
        else:
            try:
                raise AssertionError(self.fast.load(digest, nbytes, lambda: 1 / 0))  # type: ignore[arg-type, return-value]
            except AdapterMemoryFull:
                pass

    def wait_for(self, digest: str, flight: Flight, nbytes: int) -> None:
        before = self.fast.stats(0).miss_count

        def wait() -> None:
            try:
                flight.got.append(self.fast.load(digest, nbytes, flight.load))
            except (AdapterMemoryFull, StoreFailed) as error:
                flight.got.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        flight.waiters.append(thread)
        thread.start()
        while thread.is_alive() and self.fast.stats(0).miss_count == before:
            pass

    @precondition(lambda self: self.flights)
    @rule(
        data=st.data(),
        nbytes=sizes,
        seconds=st.sampled_from([0.0, 0.001, 0.5, 100.0]),
        source=st.sampled_from(["disk", "remote", "memory"]),
        sound=st.sampled_from([True, True, True, False]),
    )
    def land(self, data: st.DataObject, nbytes: int, seconds: float, source: Source, sound: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.flights)))
        flight = self.flights.pop(digest)
        self.now += seconds
        shared = SHARED.get(digest, {})
        error: type[Exception] | None = None
        if not sound:
            self.slow.fail(digest)
            error = StoreFailed
        elif self.slow.finish(digest, nbytes, shared, self.now - flight.started, source):
            flight.result = ResidentAdapter(digest, "loca", {}, nbytes, shared, source)
        else:
            flight.result = ResidentAdapter(digest, "loca", {}, nbytes, shared, source)
            error = AdapterMemoryFull
        flight.landed.set()
        for thread in flight.waiters:
            thread.join()
        if error is None:
            assert all(got is flight.result for got in flight.got)
        else:
            assert all(type(got) is error for got in flight.got)

    @rule(digest=digests, nbytes=sizes)
    def insert(self, digest: str, nbytes: int) -> None:
        shared = SHARED.get(digest, {})
        put = self.fast.insert(digest, ResidentAdapter(digest, "loca", {}, nbytes, shared))
        assert put is self.slow.insert(digest, nbytes, shared)

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        self.slow.toggle_pin(digest)
        self.fast.set_pinned(set(self.slow.pinned))

    @rule(digest=digests)
    def drop(self, digest: str) -> None:
        assert self.fast.drop(digest) is self.slow.drop(digest)

    @invariant()
    def same(self) -> None:
        stats, slots = self.fast.stats(0), self.slow.slots
        for digest in DIGESTS:
            slot = slots.get(digest)
            state = "resident" if slot and slot.resident else "loading" if slot and slot.loading else "stored"
            assert self.fast.state(digest) == state
        assert stats.resident_bytes == self.slow.used <= BUDGET
        assert stats.resident_count == sum(slot.resident for slot in slots.values())
        assert stats.leased_count == sum(slot.leases > 0 for slot in slots.values())
        assert (stats.hit_count, stats.miss_count) == (self.slow.hits, self.slow.misses)
        assert stats.eviction_count == self.slow.evictions


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
