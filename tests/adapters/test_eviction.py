"""What stays in memory: hot adapters beside scans, small and slow ones beside large and fast ones; and what that costs."""

from __future__ import annotations

import hashlib
import itertools
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from overtone.adapters.residency import ENTRY_BYTES, Residency, cache
from overtone.adapters.residency.eviction import Candidate, EvictionOrder
from overtone.adapters.resident import ResidentAdapter
from overtone.errors import AdapterMemoryFull

ADAPTERS, REQUESTS, ROOM = 1000, 10_000, 100


class LeastRecentlyUsed:
    """The twin: adapters of one size, `room` of them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.there: OrderedDict[str, None] = OrderedDict()

    def use(self, digest: str) -> bool:
        """Whether it was there."""
        hit = digest in self.there
        self.there[digest] = None
        self.there.move_to_end(digest)
        if len(self.there) > self.room:
            self.there.popitem(last=False)
        return hit


def use(residency: Residency, digest: str, nbytes: int = 1) -> bool:
    """Whether it was there."""
    hit = residency.state(digest) == "resident"
    residency.retain(digest)
    residency.load(digest, nbytes, partial(ResidentAdapter, digest, "loca", {}, nbytes))
    residency.release(digest)
    return hit


def zipf(seed: int) -> list[str]:
    """Requests for adapters of which the k-th is wanted in proportion to 1 / k."""
    weights = list(itertools.accumulate(1 / (1 + k) for k in range(ADAPTERS)))
    chosen = random.Random(seed).choices(range(ADAPTERS), cum_weights=weights, k=REQUESTS)
    return [f"hot-{k}" for k in chosen]


def hits(requests: Iterable[str]) -> tuple[int, int]:
    """(ours, those of the twin) among the requests for hot adapters. Every load costs the same."""
    ours, twin, counts = Residency(ROOM, clock=lambda: 0.0), LeastRecentlyUsed(ROOM), [0, 0]
    for digest in requests:
        hot = digest.startswith("hot")
        counts[0] += use(ours, digest) and hot
        counts[1] += twin.use(digest) and hot
    return counts[0], counts[1]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hot_adapters_stay(seed: int) -> None:
    ours, twin = hits(zipf(seed))
    assert ours >= twin


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hot_adapters_stay_beside_a_scan(seed: int) -> None:
    """Every other request is for an adapter that nobody asks for again."""
    mixed = (name for i, hot in enumerate(zipf(seed)) for name in (hot, f"cold-{i}"))
    ours, twin = hits(mixed)
    assert ours > 1.1 * twin


def test_a_scan_does_not_flush_the_hot_set() -> None:
    """As many as there is room for, once each: the hottest are all there afterwards, and of the twin's none."""
    ours, twin = Residency(ROOM, clock=lambda: 0.0), LeastRecentlyUsed(ROOM)
    for digest in (*zipf(1), *(f"cold-{i}" for i in range(ROOM))):
        use(ours, digest)
        twin.use(digest)
    hottest = [f"hot-{k}" for k in range(10)]
    assert all(ours.state(digest) == "resident" for digest in hottest)
    assert not any(digest in twin.there for digest in hottest)


def test_small_ones_and_slow_ones_stay_longer() -> None:
    now = 0.0
    residency = Residency(1000, clock=lambda: now)

    def load(digest: str, nbytes: int, seconds: float) -> None:
        def loader() -> ResidentAdapter:
            nonlocal now
            now += seconds
            return ResidentAdapter(digest, "loca", {}, nbytes)

        residency.retain(digest)
        residency.load(digest, nbytes, loader)
        residency.release(digest)

    def there(*digests: str) -> list[str]:
        return [digest for digest in digests if residency.state(digest) == "resident"]

    load("small", 100, 0.001)
    load("large", 500, 0.001)
    load("slow", 400, 0.1)
    load("next", 100, 0.001)
    assert there("small", "large", "slow", "next") == ["small", "slow", "next"]
    load("last", 500, 0.001)
    assert there("small", "slow", "next", "last") == ["slow", "next", "last"]


def test_what_was_hot_once_goes_in_the_end() -> None:
    residency = Residency(10, clock=lambda: 0.0)
    for _ in range(50):
        use(residency, "once")
    stayed = 0
    for i in range(600):
        use(residency, f"new-{i}")
        stayed += residency.state("once") == "resident"
    assert 10 < stayed < 600


def test_the_heap_is_bounded_and_each_is_in_it_once() -> None:
    """Adapters come, are leased, pinned and removed, and nothing is ever evicted."""
    residency = Residency(1 << 40)
    rng = random.Random(1)
    for i in range(3000):
        use(residency, f"{i}")
        use(residency, f"{rng.randrange(max(0, i - 90), i + 1)}")
        residency.drop(f"{i - 100}")
        residency.set_pinned({f"{rng.randrange(i + 1)}" for _ in range(3)})
    heap = residency._contents.order._heap
    assert residency.stats(0).resident_count == 100
    assert len(heap) < 300
    assert len({id(one) for one in heap}) == len(heap)


def test_an_eviction_looks_at_few() -> None:
    """All places in the heap are of old, and the first eviction does not pay for that."""

    class Counted(Candidate):
        __slots__ = ()
        compared = 0

        def __lt__(self, other: Candidate) -> bool:
            Counted.compared += 1
            return super().__lt__(other)

    order = EvictionOrder[Counted]()
    many = [Counted(str(i), temporary=False) for i in range(4096)]
    for one in many:
        order.use(one)
        order.value(one, 1.0)
        order.offer(one)
    for one in reversed(many):
        order.use(one)
    Counted.compared = 0
    assert order.take() is not None
    assert Counted.compared < 32 * 2 * 2 * 13


@pytest.mark.parametrize("shared", [0, 90])
@pytest.mark.parametrize("how", ["load", "insert"])
def test_room_for_a_large_one_is_made_bit_by_bit(monkeypatch: pytest.MonkeyPatch, how: str, shared: int) -> None:
    """Nobody waits for the lock until all that must go has gone."""
    monkeypatch.setattr(cache, "_BIT", 10)
    residency = Residency(100)
    for i in range(100):
        use(residency, f"{i}")
    evicted: list[int] = []
    make_room = residency._contents.make_room

    def watched(missing: int) -> list[ResidentAdapter] | None:
        gone = make_room(missing)
        evicted.append(len(gone or ()))
        return gone

    monkeypatch.setattr(residency._contents, "make_room", watched)
    large = ResidentAdapter("large", "vera", {}, 95 - shared, {"x": shared} if shared else {})
    if how == "insert":
        assert residency.insert("large", large)
    else:
        residency.retain("large")
        assert residency.load("large", large.nbytes, lambda: large) is large
    assert max(evicted) == 10
    assert sum(evicted) == 95
    assert residency.stats(0).resident_bytes == 100


def test_nothing_goes_for_what_finds_no_room_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an idle one shares with it would not be free."""
    monkeypatch.setattr(cache, "_BIT", 10)
    residency = Residency(100)
    residency.set_pinned({"pinned"})
    use(residency, "pinned", 44)
    assert residency.insert("idle", ResidentAdapter("idle", "vera", {}, 10, {"x": 40}))
    twin = ResidentAdapter("twin", "vera", {}, 20, {"x": 40})
    assert not residency.insert("twin", twin)
    residency.retain("twin")
    with pytest.raises(AdapterMemoryFull):
        residency.load("twin", 1, lambda: twin)
    residency.release("twin")
    assert residency.state("idle") == "resident"
    assert residency.stats(0).resident_bytes == 94
    assert residency.insert("twin", ResidentAdapter("twin", "vera", {}, 16, {"x": 40}))
    assert residency.stats(0).resident_bytes == 100


def test_a_refusal_looks_at_no_candidate() -> None:
    """What leased and pinned ones share is no room, and is not looked for among all that is idle."""
    residency = Residency(1000)
    for i in range(100):
        use(residency, f"{i}")
    for name in ("leased", "pinned"):
        residency.insert(name, ResidentAdapter(name, "vera", {}, 10, {name: 300, "both": 100}))
    residency.retain("leased")
    residency.set_pinned({"pinned"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency._contents.order, "take", lambda: 1 / 0)
        with pytest.raises(AdapterMemoryFull):
            use(residency, "new", 500)
    residency.release("leased")
    use(residency, "new", 500)  # with one of them goes what the other one does not share
    assert (residency.state("leased"), residency.state("pinned")) == ("stored", "resident")


def test_what_an_entry_takes() -> None:
    """`ENTRY_BYTES` covers it where the table has just grown, and is not a guess far off."""

    def digests() -> Iterator[str]:
        return (hashlib.sha256(str(i).encode()).hexdigest() for i in itertools.count())

    count, residency = 2750, Residency(1 << 50)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i, digest in enumerate(itertools.islice(digests(), count)):
        use(residency, digest, 1_000_000 + i)
    taken = (tracemalloc.get_traced_memory()[0] - before) / count
    tracemalloc.stop()
    assert ENTRY_BYTES / 2 < taken <= ENTRY_BYTES
