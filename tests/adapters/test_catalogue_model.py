"""Any sequence of changes leaves the catalogue as it leaves a few dictionaries, and clean."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from overtone.adapters.catalogue import Catalogue, Counts, Entry, Freed, Options, listing
from overtone.adapters.packs import OWN_FILE, PackFacts, Place
from overtone.adapters.paging import Listing, Order, OrderField
from overtone.adapters.records import AdapterRecord, Version
from overtone.errors import AdapterExists, AdapterNotFound, StoreFailed
from support.catalogue_model import Model
from support.catalogues import Packer, all_pages, digests, in_order, version

IDS = [f"a-{i}" for i in range(6)]
SHARED = [(), ("layout",), ("layout", "places"), ("places", "matrix")]
VERSIONS = [version(f"v{i}", *SHARED[i % 4], kind=i % 3, size=10 * (i % 2)) for i in range(7)]
TENANTS = ["", "acme", "bravo"]
LABELS: list[dict[str, str]] = [{}, {"k": "v"}, {"k": "w", "other": ""}]

ids, versions = st.sampled_from(IDS), st.sampled_from(VERSIONS)
pins, labels = st.none() | st.booleans(), st.none() | st.sampled_from(LABELS)
tenants = st.none() | st.sampled_from(TENANTS)
entries = st.builds(
    Entry, ids, versions, st.builds(Options, pinned=pins, labels=labels, tenant=tenants, create_only=st.booleans())
)

Check = Callable[[AdapterRecord], bool]
TERMS: list[tuple[str, Check]] = [
    ('family = "loca"', lambda r: r.family == "loca"),
    ('tenant = "acme"', lambda r: r.tenant == "acme"),
    ('tenant = ""', lambda r: not r.tenant),
    ('state = "ready"', lambda r: r.state == "ready"),
    ('state = "quarantined"', lambda r: r.state != "ready"),
    ("pinned = true", lambda r: r.pinned),
    ('labels.k = "v"', lambda r: r.labels.get("k") == "v"),
    (f'base_fingerprint = "{"e" * 64}"', lambda r: r.base_fingerprint == "e" * 64),
    ('id > "a-1"', lambda r: r.id > "a-1"),
    ('id < "a-4"', lambda r: r.id < "a-4"),
]
orders = st.builds(Order, st.sampled_from(get_args(OrderField)), st.booleans())


class CatalogueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model, self.packer = Model(), Packer(per_pack=3)
        self.seen: dict[str, AdapterRecord] = {}

    @initialize()
    def open(self) -> None:
        self.catalogue = Catalogue(Path(self.folder.name) / "catalogue.sqlite3")
        self.catalogue._connections._writer.execute("PRAGMA synchronous=OFF")

    @rule()
    def reopen(self) -> None:
        self.catalogue.close()
        self.open()

    def places(self, batch: list[Entry], again: bool, own: bool) -> dict[str, Place]:
        """Of blobs that are not known; with `again`, also of those that are."""
        names = sorted(digests(entry.version for entry in batch))
        wanted = [name for name in names if again or name not in self.model.places]
        found = {name: self.packer.place(self.length(name)) for name in wanted}
        return {name: Place(OWN_FILE, 0, place.length) if own else place for name, place in found.items()}

    @staticmethod
    def length(digest: str) -> int:
        return next((one.size_bytes for one in VERSIONS if one.digest == digest), 77)

    @rule(entry=entries, again=st.booleans(), own=st.booleans(), dry=st.booleans())
    def put(self, entry: Entry, again: bool, own: bool, dry: bool) -> None:
        exists, digest = entry.adapter_id in self.model.adapters, entry.version.digest
        if entry.options.create_only and exists:
            with pytest.raises(AdapterExists):
                self.catalogue.put(entry, self.places([entry], again, own))
        elif dry:
            options = entry.options
            tried = Entry(
                entry.adapter_id,
                entry.version,
                Options(options.pinned, options.labels, options.tenant, validate_only=True),
            )
            assert self.catalogue.put(tried, {}).digest == digest
        else:
            places = self.places([entry], again, own)
            record = self.catalogue.put(entry, places)
            assert self.model.put_many([entry], places) != ["exists"]
            assert record == self.catalogue.get(entry.adapter_id)

    @rule(batch=st.lists(entries, max_size=8), again=st.booleans(), own=st.booleans(), lost=st.booleans())
    def put_many(self, batch: list[Entry], again: bool, own: bool, lost: bool) -> None:
        places = self.places(batch, again, own)
        if lost and places:
            places.pop(min(places))
        if self.model.lacks(batch, places):
            with pytest.raises(StoreFailed):
                self.catalogue.put_many(batch, places)
            return
        outcomes = self.catalogue.put_many(batch, places)
        assert [one.outcome for one in outcomes] == self.model.put_many(batch, places)
        assert [(one.adapter_id, one.digest) for one in outcomes] == [(e.adapter_id, e.version.digest) for e in batch]

    @rule(adapter_id=ids, pinned=pins, chosen=labels)
    def update(self, adapter_id: str, pinned: bool | None, chosen: dict[str, str] | None) -> None:
        if adapter_id not in self.model.adapters:
            with pytest.raises(AdapterNotFound):
                self.catalogue.update(adapter_id, pinned=pinned, labels=chosen)
        else:
            self.catalogue.update(adapter_id, pinned=pinned, labels=chosen)
            self.model.change(adapter_id, Options(pinned=pinned, labels=chosen))

    @rule(adapter_id=ids, wanted=st.none() | versions)
    def activate(self, adapter_id: str, wanted: Version | None) -> None:
        adapter = self.model.adapters.get(adapter_id)
        prefix = "" if wanted is None else wanted.digest[:12]
        target = (wanted.digest if wanted is not None else adapter.previous) if adapter else None
        if adapter is None or target not in adapter.versions:
            with pytest.raises(AdapterNotFound):
                self.catalogue.activate(adapter_id, prefix)
        else:
            assert self.catalogue.activate(adapter_id, prefix).digest == target
            self.model.activate(adapter_id, str(target))

    @rule(adapter_id=ids)
    def delete(self, adapter_id: str) -> None:
        if adapter_id in self.model.adapters:
            assert self.catalogue.delete(adapter_id) == Freed(tuple(self.model.delete(adapter_id)))

    @rule(chosen=st.lists(ids, unique=True, max_size=3), keep=st.integers(0, 3))
    def prune_many(self, chosen: list[str], keep: int) -> None:
        there = [adapter_id for adapter_id in chosen if adapter_id in self.model.adapters]
        freed = [digest for adapter_id in there for digest in self.model.prune(adapter_id, keep)]
        assert sorted(self.catalogue.prune_many(chosen, keep).versions) == sorted(freed)

    @rule(chosen=st.lists(versions, max_size=4))
    def release(self, chosen: list[Version]) -> None:
        names = [one.digest for one in chosen]
        left = self.catalogue.release(names)
        assert len(left) == len(dict(left))
        assert dict(left) == self.model.release(names)

    @rule(used=st.dictionaries(ids, st.integers(1, 9), max_size=4))
    def touch(self, used: dict[str, int]) -> None:
        self.catalogue.touch(used)
        for adapter_id, time in used.items():
            if adapter_id in self.model.adapters:
                adapter = self.model.adapters[adapter_id]
                adapter.used = max(adapter.used, time)

    @rule(one=versions, sound=st.booleans())
    def mark(self, one: Version, sound: bool) -> None:
        digest = one.digest
        (self.catalogue.heal if sound else self.catalogue.quarantine)(digest)
        if sound:
            self.model.quarantined.discard(digest)
        elif digest in self.model.places:
            self.model.quarantined.add(digest)

    @precondition(lambda self: self.model.places)
    @rule(data=st.data(), stale=st.booleans())
    def move(self, data: st.DataObject, stale: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.model.places)), max_size=3, unique=True))
        moves = []
        for name in names:
            old, new = self.model.places[name], self.packer.place(self.length(name))
            moves.append((name, Place(99, 0, old.length) if stale else old, new))
            if not stale:
                self.model.set_place(name, new)
        self.catalogue.move(moves)

    @rule(number=st.integers(0, 20))
    def drop_pack(self, number: int) -> None:
        empty = number in self.model.ends and all(place.pack != number for place in self.model.places.values())
        assert self.catalogue.drop_pack(number) == empty
        if empty:
            del self.model.ends[number]

    @rule(
        terms=st.lists(st.sampled_from(TERMS), max_size=3, unique_by=lambda term: term[0].split(" ")[0]),
        order=orders,
        size=st.integers(1, 4),
    )
    def pages(self, terms: list[tuple[str, Check]], order: Order, size: int) -> None:
        records = [self.catalogue.get(adapter_id) for adapter_id in self.model.adapters]
        wanted = in_order([record for record in records if all(check(record) for _, check in terms)], order)
        assert all_pages(self.catalogue, Listing(size, " AND ".join(text for text, _ in terms), order)) == wanted

    @invariant()
    def same(self) -> None:
        assert self.catalogue.counts() == Counts(
            len(self.model.adapters),
            len(self.model.contents),
            len(self.model.places),
            sum(place.length for place in self.model.places.values()),
        )
        for adapter_id, adapter in self.model.adapters.items():
            record = self.catalogue.get(adapter_id)
            assert (record.digest, list(record.versions)) == (adapter.current, adapter.versions)
            assert (record.pinned, record.labels, record.tenant) == (adapter.pinned, adapter.labels, adapter.tenant)
            assert record.etag == f"{record.uid}-{adapter.revision}"
            assert (record.state == "quarantined") == (adapter.current in self.model.quarantined)
            used = (record.last_used_time - datetime(1970, 1, 1, tzinfo=UTC)) if record.last_used_time else timedelta()
            assert used == timedelta(microseconds=adapter.used)
            self.later(record)
        pinned = {a.current for a in self.model.adapters.values() if a.pinned}
        assert self.catalogue.pinned().keys() == pinned
        live = {n: [p.length for p in self.model.places.values() if p.pack == n] for n in self.model.ends}
        facts = [PackFacts(n, end, sum(live[n]), len(live[n])) for n, end in sorted(self.model.ends.items())]
        assert self.catalogue.packs() == facts
        assert set(self.catalogue.unused()) == set(self.model.unused(sorted(self.model.contents)))

    def later(self, record: AdapterRecord) -> None:
        """A change is later than the one before; without one the times stay."""
        before = self.seen.get(record.id)
        if before is not None and before.uid == record.uid:
            assert record.create_time == before.create_time
            assert (record.update_time > before.update_time) == (record.etag != before.etag)
        self.seen[record.id] = record

    def teardown(self) -> None:
        assert self.catalogue.check() == []
        self.catalogue.close()
        self.folder.cleanup()


@pytest.mark.parametrize("examined", [10_000, 2], ids=["sorted", "tested"])
def test_like_dictionaries(examined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """examined: how many adapters may be sorted for a page; with 2, most lists are tested one by one."""
    monkeypatch.setattr(listing, "EXAMINED", examined)
    limits = settings(max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(CatalogueMachine, settings=limits)  # type: ignore[no-untyped-call]
