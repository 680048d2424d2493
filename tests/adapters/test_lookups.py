"""What is remembered of ids is never older than a change that was acknowledged, however readers and writers interleave."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from overtone.adapters import AdapterStore
from overtone.adapters.coherent import CoherentCache
from overtone.adapters.lookups import Lookups
from overtone.adapters.store import Wanted
from overtone.errors import AdapterNotFound, InvalidRequest
from support.adapters import put

Make = Callable[[int], Path]
KEYS = ["a", "b", "c"]
keys = st.sampled_from(KEYS)


class Interleaved(RuleBasedStateMachine):
    """Readers and writers whose steps come in any order. A value is the number of the commit that wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = CoherentCache[int](2)
        self.truth = Counter[str]()
        self.acknowledged = Counter[str]()

    asking = Bundle("asking")
    answered = Bundle("answered")
    committed = Bundle("committed")

    @rule(target=asking, key=keys)
    def ask(self, key: str) -> tuple[str, int]:
        return key, self.cache.ticket(key)

    @rule(target=answered, asked=consumes(asking))
    def read(self, asked: tuple[str, int]) -> tuple[str, int, int]:
        return *asked, self.truth[asked[0]]

    @rule(answer=consumes(answered))
    def keep(self, answer: tuple[str, int, int]) -> None:
        key, ticket, value = answer
        self.cache.put(key, value, ticket)

    @rule(target=committed, key=keys)
    def commit(self, key: str) -> tuple[str, int]:
        self.truth[key] += 1
        return key, self.truth[key]

    @rule(commit=consumes(committed), everything=st.booleans())
    def acknowledge(self, commit: tuple[str, int], everything: bool) -> None:
        key, value = commit
        if everything:
            self.cache.clear()
        else:
            self.cache.forget(key)
        self.acknowledged[key] = max(self.acknowledged[key], value)

    @rule(key=keys)
    def look(self, key: str) -> None:
        self.cache.get(key)

    @invariant()
    def nothing_is_older(self) -> None:
        assert len(self.cache._found) <= 2
        for key, (value, _) in self.cache._found.items():
            assert self.acknowledged[key] <= value <= self.truth[key]


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class Table:
    """A catalogue of rows that counts how often it was asked."""

    def __init__(self, **rows: str) -> None:
        self.rows = rows
        self.asked = Counter[str]()

    def resolve(self, adapter_id: str, prefix: str) -> str:
        self.asked[adapter_id] += 1
        found = self.rows.get(adapter_id)
        if found is None:
            raise AdapterNotFound(f"there is no adapter {adapter_id}", metadata={"adapter": adapter_id})
        if not found.startswith(prefix):
            raise AdapterNotFound("no such version", metadata={"adapter": adapter_id, "version": prefix})
        return found


def test_an_id_is_asked_for_once() -> None:
    table = Table(a="one")
    lookups = Lookups(table.resolve)
    assert lookups.peek("a") is None
    assert [lookups.resolve("a", prefix) for prefix in ("", "", "o", "o", "on")] == ["one"] * 5
    assert (lookups.peek("a"), lookups.peek("a", "o"), lookups.peek("a", "one")) == ("one", "one", None)
    assert table.asked["a"] == 3
    with lookups.change("a"):
        table.rows["a"] = "other"
    assert (lookups.peek("a"), lookups.peek("a", "o")) == (None, None)
    assert lookups.resolve("a") == "other"


def test_what_is_missing_is_said_again_for_a_while_and_in_the_same_words() -> None:
    now, table = [0.0], Table(a="one")
    lookups = Lookups(table.resolve, missing_seconds=5.0, clock=lambda: now[0])
    for ask in (lookups.resolve, lookups.resolve, lookups.peek):
        with pytest.raises(AdapterNotFound, match="there is no adapter b") as caught:
            ask("b", "")
        assert caught.value.metadata == {"adapter": "b"}
    assert table.asked["b"] == 1
    for _ in range(2):
        with pytest.raises(AdapterNotFound, match="no such version"):
            lookups.resolve("a", "x")
    assert (table.asked["a"], lookups.resolve("a")) == (2, "one")
    now[0] = 5.0
    assert lookups.peek("b") is None
    with pytest.raises(AdapterNotFound):
        lookups.resolve("b")
    with lookups.change("b"):
        table.rows["b"] = "two"
    assert lookups.resolve("b") == "two"


def test_a_change_that_failed_and_one_of_everything() -> None:
    table = Table(a="one", b="two")
    lookups = Lookups(table.resolve)
    for name in ("a", "b"):
        lookups.resolve(name)
    with pytest.raises(ZeroDivisionError), lookups.change("a"):
        raise ZeroDivisionError
    assert (lookups.peek("a"), lookups.peek("b")) == (None, "two")
    lookups.change_all()
    assert lookups.peek("b") is None


def test_what_is_remembered_is_bounded() -> None:
    cache = CoherentCache[int](100)
    for i in range(1000):
        cache.put(str(i), i, cache.ticket(str(i)))
        assert cache.get("0") == 0, "what is asked for stays"
    assert len(cache._found) == 100
    lookups = Lookups(Table(a="f" * 64).resolve)
    for length in range(12, 64):
        lookups.resolve("a", "f" * length)
    assert len(lookups._versions.get("a") or {}) <= 8


def test_no_thread_ever_misses_what_it_has_made() -> None:
    """Writers create and delete ids and look at once; readers keep asking for the same ids, so that "missing" is always on
    its way into the cache."""
    table = Table()
    lookups = Lookups(table.resolve)
    wrong: list[str] = []
    done = threading.Event()

    def known(adapter_id: str) -> bool:
        try:
            lookups.resolve(adapter_id)
        except AdapterNotFound:
            return False
        return True

    def write(name: str) -> None:
        for _ in range(400):
            with lookups.change(name):
                table.rows[name] = "one"
            if not known(name):
                wrong.append(f"{name} was hidden")
            with lookups.change(name):
                del table.rows[name]
            if known(name):
                wrong.append(f"{name} was not gone")

    def read() -> None:
        while not done.is_set():
            for name in KEYS:
                known(name)

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for writer in [pool.submit(write, name) for name in KEYS]:
            writer.result()
        done.set()
        for reader in readers:
            reader.result()
    assert not wrong


def test_a_lease_on_what_is_in_memory_asks_nobody(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = put(store, loca(1), "a")
    put(store, loca(2), "b")
    references = ["a", f"a@{record.digest[:12]}", f"adapters/a@{record.digest}"]
    wanted = [[Wanted(reference)] for reference in references] + [[Wanted("a"), Wanted("b", weight=0.5)]]
    assert all(store.acquire_resident(one) is None for one in wanted)
    before = [store.acquire_all(one) for one in wanted]
    monkeypatch.setattr(store._lookups, "_resolve", None)
    for one, lease in zip(wanted, before, strict=True):
        again = store.acquire_resident(one)
        assert again is not None
        assert (again.adapter, again.shares) == (lease.adapter, lease.shares)
        again.release()
        lease.release()
    assert store._versions.residency.stats(0).leased_count == 0


def test_a_lease_from_memory_follows_every_change(store: AdapterStore, loca: Make) -> None:
    one = put(store, loca(1), "a")
    with store.acquire("a"):
        two = put(store, loca(2), "a")
        assert store.acquire_resident([Wanted("a")]) is None
        with store.acquire("a") as lease:
            assert lease.adapter.digest == two.digest
        old = store.acquire_resident([Wanted(f"a@{one.digest}")])
        assert old is None, "asked for under this name for the first time"
        store.acquire(f"a@{one.digest}").release()
        with store.acquire_resident([Wanted(f"a@{one.digest}")]) as lease:  # type: ignore[union-attr]
            assert lease.adapter.digest == one.digest
        store.delete("a")
        assert store.acquire_resident([Wanted("a")]) is None
        for _ in range(2):
            with pytest.raises(AdapterNotFound, match="there is no adapter a"):
                store.acquire("a")
        with pytest.raises(AdapterNotFound, match=r"adapters\[1\]"):
            store.acquire_resident([Wanted("a", label="adapters[1]")])
    put(store, loca(3), "a")
    store.acquire("a").release()
    assert store.acquire_resident([Wanted("a")]) is not None
    with pytest.raises(InvalidRequest):
        store.acquire_resident([Wanted("a@short")])
