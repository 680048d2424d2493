"""Memory: loaded once however many ask, evicted by worth, never while leased or pinned, never over budget."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from overtone.adapters.residency import Residency
from overtone.adapters.resident import ResidentAdapter, Source
from overtone.errors import AdapterMemoryFull, StoreFailed

SIZES = {"a": 40, "b": 40, "c": 40, "d": 100, "e": 101}


class Loader:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __call__(self, digest: str) -> ResidentAdapter:
        self.loaded.append(digest)
        return ResidentAdapter(digest, "loca", {}, SIZES[digest])


def use(
    residency: Residency,
    digest: str,
    loader: Callable[[str], ResidentAdapter] | None = None,
    *,
    temporary: bool = False,
) -> ResidentAdapter:
    residency.retain(digest, temporary=temporary)
    try:
        return residency.load(digest, SIZES[digest], partial(loader or Loader(), digest))
    finally:
        residency.release(digest)


def resident(residency: Residency) -> str:
    return "".join(digest for digest in SIZES if residency.state(digest) == "resident")


def test_least_recently_used_goes_first() -> None:
    residency = Residency(100)
    for digest in "abac":
        use(residency, digest)
    assert resident(residency) == "ac"
    assert residency.stats(0).eviction_count == 1
    assert (residency.stats(0).load_count, residency.stats(0).hit_count) == (3, 1)
    use(residency, "d")
    assert resident(residency) == "d"
    assert residency.stats(0).resident_bytes == 100


def test_leased_and_pinned_stay_and_nothing_is_evicted_in_vain() -> None:
    residency = Residency(100)
    residency.set_pinned({"a"})
    use(residency, "a")
    use(residency, "b")
    with pytest.raises(AdapterMemoryFull, match="in use or pinned") as caught:
        use(residency, "d")
    assert caught.value.retry_after_s == 1.0
    assert resident(residency) == "ab"
    use(residency, "c")
    assert resident(residency) == "ac"
    residency.retain("c")
    with pytest.raises(AdapterMemoryFull):
        use(residency, "b")
    residency.release("c")
    residency.set_pinned(set())
    use(residency, "d")
    assert resident(residency) == "d"


def test_larger_than_all_memory_never_fits() -> None:
    loader = Loader()
    residency = Residency(100)
    with pytest.raises(AdapterMemoryFull, match="never fits") as caught:
        use(residency, "e", loader)
    assert caught.value.retry_after_s is None
    assert loader.loaded == []


def test_one_load_for_all_who_ask_and_digests_side_by_side() -> None:
    """Both loads must have begun before either may end, so loads that waited for each other would hang."""
    both = threading.Barrier(3)
    loader = Loader()

    def slow(digest: str) -> ResidentAdapter:
        both.wait(60)
        return loader(digest)

    residency = Residency(100)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(use, residency, digest, slow) for digest in "ab" * 8]
        both.wait(60)
        got = [future.result() for future in futures]
    assert sorted(loader.loaded) == ["a", "b"]
    assert len({id(adapter) for adapter in got}) == 2
    assert residency.stats(0).leased_count == 0


def test_a_failed_load_reaches_all_waiters_and_the_next_call_tries_again() -> None:
    begun, go_on, broken = threading.Event(), threading.Event(), [True]

    def load(digest: str) -> ResidentAdapter:
        begun.set()
        assert go_on.wait(60)
        if broken[0]:
            raise StoreFailed("no disk")
        return ResidentAdapter(digest, "loca", {}, 40)

    residency = Residency(100)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(use, residency, "a", load) for _ in range(4)]
        assert begun.wait(60)
        assert residency.state("a") == "loading"
        while not all(future.running() for future in futures) or residency._entries["a"].leases < 4:
            pass
        go_on.set()
        assert all(isinstance(future.exception(), StoreFailed) for future in futures)
    assert residency.stats(0).resident_bytes == 0
    assert residency.state("a") == "stored"
    broken[0] = False
    assert use(residency, "a", load).digest == "a"


def test_drop_waits_for_the_last_lease() -> None:
    residency = Residency(100)
    residency.retain("a")
    residency.load("a", 40, partial(Loader(), "a"))
    assert not residency.drop("a")
    residency.release("a")
    assert residency.drop("a")
    assert residency.drop("a")
    assert residency.stats(0).resident_bytes == 0


def test_many_threads_never_exceed_the_budget() -> None:
    residency = Residency(100)
    problems: list[str] = []

    def play(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            digest = rng.choice("abcd")
            residency.retain(digest)
            try:
                if residency.load(digest, SIZES[digest], partial(Loader(), digest)).digest != digest:
                    problems.append("another adapter")
                if residency.state(digest) != "resident":
                    problems.append("evicted under a lease")
            except AdapterMemoryFull:
                pass
            if residency.stats(0).resident_bytes > 100:
                problems.append("over budget")
            residency.release(digest)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(play, range(6)))
    assert not problems
    stats = residency.stats(0)
    assert stats.leased_count == 0
    assert stats.resident_bytes == sum(SIZES[d] for d in resident(residency))


def test_temporary_adapters_go_first() -> None:
    residency = Residency(100)
    use(residency, "a")
    use(residency, "b", temporary=True)
    use(residency, "c")
    assert resident(residency) == "ac"
    use(residency, "b", temporary=True)
    assert resident(residency) == "bc"
    use(residency, "b")  # somebody has stored it meanwhile
    use(residency, "a", temporary=True)
    assert resident(residency) == "ab"


def test_what_adapters_share_counts_once_and_until_the_last_is_gone() -> None:
    shared = {"a": {"x": 10}, "b": {"x": 15, "y": 5}}

    def load(digest: str) -> ResidentAdapter:
        return ResidentAdapter(digest, "vera", {}, 20, shared[digest])

    residency = Residency(100)
    used = []
    for digest in "ab":
        use(residency, digest, load)
        used.append(residency.stats(0).resident_bytes)
    assert used == [30, 60]  # x is larger in b, and nobody needs both
    assert residency.drop("b")
    assert residency.stats(0).resident_bytes == 35
    assert residency.drop("a")
    assert residency.stats(0).resident_bytes == 0


def test_a_load_that_shares_more_than_fits_makes_others_go() -> None:
    residency = Residency(100)
    use(residency, "a")
    use(residency, "b", lambda digest: ResidentAdapter(digest, "vera", {}, 40, {"x": 50}))
    assert resident(residency) == "b"
    assert residency.stats(0).resident_bytes == 90


def test_shared_bytes_can_be_freed_too() -> None:
    """What eviction would free includes what only the evicted share."""
    residency = Residency(1000)
    use(residency, "a", lambda digest: ResidentAdapter(digest, "vera", {}, 10, {"x": 800}))
    residency.retain("c")
    assert residency.load("c", 300, lambda: ResidentAdapter("c", "loca", {}, 300)).nbytes == 300
    assert resident(residency) == "c"
    assert residency.stats(0).resident_bytes == 300


def test_what_the_leased_share_is_not_freed() -> None:
    """What looked like room was none: nothing is evicted, and everything can be evicted still."""
    residency = Residency(100)
    residency.retain("a")
    residency.load("a", 20, lambda: ResidentAdapter("a", "vera", {}, 20, {"x": 30}))
    use(residency, "b", temporary=True)
    for nbytes, there in ((60, "ab"), (50, "a")):
        residency.retain("c")
        if there == "ab":
            with pytest.raises(AdapterMemoryFull):
                residency.load("c", nbytes, partial(Loader(), "c"))
        else:
            residency.load("c", nbytes, lambda: ResidentAdapter("c", "loca", {}, 50))
        residency.release("c")
        assert resident(residency).removesuffix("c") == there


def test_what_turns_out_not_to_fit_is_given_up() -> None:
    residency = Residency(100)
    residency.retain("a")
    residency.load("a", 40, partial(Loader(), "a"))
    for shared, retry in ((50, 1.0), (200, None)):
        with pytest.raises(AdapterMemoryFull) as caught:
            use(residency, "b", lambda digest, n=shared: ResidentAdapter(digest, "vera", {}, 40, {"x": n}))  # type: ignore[misc]
        assert caught.value.retry_after_s == retry
        assert (resident(residency), residency.stats(0).resident_bytes) == ("a", 40)
    use(residency, "b")
    assert resident(residency) == "ab"


def test_what_is_in_memory_already_is_taken_in() -> None:
    """If it has room beside what is leased or pinned; what is there or on its way stays as it is."""
    residency = Residency(100)
    mine = Loader()("a")
    assert residency.insert("a", mine)
    assert residency.insert("a", Loader()("a"))
    residency.retain("a")
    assert residency.load("a", 40, partial(Loader(), "a")) is mine
    assert residency.insert("b", Loader()("b"))
    assert residency.insert("c", Loader()("c"))
    assert resident(residency) == "ac"
    residency.set_pinned({"c"})
    assert not residency.insert("b", Loader()("b"))
    assert resident(residency) == "ac"
    residency.release("a")
    residency.set_pinned(set())
    assert residency.insert("d", Loader()("d"))
    assert (resident(residency), residency.stats(0).resident_bytes) == ("d", 100)
    assert not residency.insert("e", Loader()("e"))
    stats = residency.stats(0)
    assert (stats.load_count, stats.memory_load_count, stats.disk_load_count, stats.hit_count) == (4, 4, 0, 1)


def test_inserted_between_retain_and_load_and_during_a_load() -> None:
    residency = Residency(100)
    residency.retain("a")
    mine = Loader()("a")
    assert residency.insert("a", mine)
    assert residency.load("a", 40, partial(Loader(), "a")) is mine
    residency.release("a")
    refused: list[bool] = []

    def load() -> ResidentAdapter:
        refused.append(residency.insert("b", Loader()("b")))
        return Loader()("b")

    residency.retain("b")
    residency.load("b", 40, load)
    residency.release("b")
    assert refused == [False]
    assert (resident(residency), residency.stats(0).resident_bytes) == ("ab", 80)


def test_what_was_brought_for_a_use_is_a_miss_and_used_once() -> None:
    residency = Residency(100)
    for digest in "ab":
        residency.retain(digest)
        residency.bring(digest, 40, partial(Loader(), digest))
        residency.load(digest, 40, partial(Loader(), digest), waited=digest == "a")
        residency.release(digest)
    stats = residency.stats(0)
    assert (stats.load_count, stats.hit_count, stats.miss_count) == (2, 1, 1)
    assert [residency._entries[digest].used for digest in "ab"] == [1, 2]


def test_a_lease_on_what_is_in_memory_and_on_nothing_else() -> None:
    residency = Residency(100)
    assert residency.retain_resident("a") is None
    use(residency, "a")
    adapter = residency.retain_resident("a")
    assert adapter is not None
    assert not residency.drop("a")
    residency.release("a")
    assert residency.drop("a")
    stats = residency.stats(0)
    assert (stats.hit_count, stats.miss_count, stats.leased_count) == (1, 1, 0)


def test_who_must_not_wait_does_not_wait_for_the_lock() -> None:
    residency = Residency(100)
    use(residency, "a")
    with residency._lock:
        assert residency.retain_resident("a") is None
    assert residency.retain_resident("a") is not None


def test_loads_are_counted_by_where_they_come_from() -> None:
    sources: dict[str, Source] = {"a": "disk", "b": "remote", "c": "memory"}
    residency = Residency(200)
    for digest, source in sources.items():
        use(residency, digest, lambda digest, source=source: ResidentAdapter(digest, "x", {}, 1, {}, source))  # type: ignore[misc]
    stats = residency.stats(0)
    assert (stats.disk_load_count, stats.remote_load_count, stats.memory_load_count) == (1, 1, 1)
    assert (stats.load_count, stats.miss_count) == (3, 3)


def test_the_overhead_counts() -> None:
    residency = Residency(100, overhead=10)
    for digest in "abc":
        use(residency, digest)
    assert (resident(residency), residency.stats(0).resident_bytes) == ("bc", 100)
    assert residency.fits(90)
    assert not residency.fits(91)
    with pytest.raises(AdapterMemoryFull, match="never fits"):
        use(residency, "d")


def test_a_failure_keeps_nothing_in_memory() -> None:
    """Neither the error nor what was evicted lives in a cycle that only the garbage collector ends."""
    residency = Residency(100)
    use(residency, "a")

    def broken(digest: str) -> ResidentAdapter:
        raise StoreFailed("no disk")

    gc.collect()
    gc.disable()
    try:
        errors = []
        for _ in range(2):
            with pytest.raises(StoreFailed) as caught:
                use(residency, "d", broken)
            errors.append(weakref.ref(caught.value))
            del caught
        assert [error() for error in errors] == [None, None]
    finally:
        gc.enable()
