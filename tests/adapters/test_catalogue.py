"""The catalogue's changes and answers, one at a time; `test_catalogue_model.py` has them in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overtone.adapters.catalogue import Catalogue, Counts, Freed, Outcome, Resolved
from overtone.adapters.packs import OWN_FILE, BlobIndex, PackFacts, Place
from overtone.adapters.paging import Listing
from overtone.errors import AdapterExists, AdapterNotFound, EtagMismatch, InvalidRequest, StoreFailed
from support.catalogues import KINDS, Packer, digest, entry, version

A, B, C = version("a", "layout"), version("b", "layout", "places", size=200), version("c", kind=2)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(tmp_path / "catalogue.sqlite3")
    yield opened
    assert opened.check() == []
    opened.close()


@pytest.fixture
def packer() -> Packer:
    return Packer()


def test_a_record_says_what_was_put(catalogue: Catalogue, packer: Packer) -> None:
    put = entry("x", C, pinned=True, labels={"team": "blue", "a b": 'ä"\\'}, tenant="acme")
    record = catalogue.put(put, packer.places(C))
    assert (record.id, record.digest, record.versions) == ("x", C.digest, (C.digest,))
    assert (record.family, record.base_fingerprint, record.basis) == ("lora", "e" * 64, "svd")
    assert (record.module_count, record.parameter_count, record.base_model_name_or_path) == (4, 1000, "example/other")
    assert (record.pinned, record.labels, record.tenant) == (True, {"team": "blue", "a b": 'ä"\\'}, "acme")
    assert (record.size_bytes, record.state, record.last_used_time) == (100, "ready", None)
    assert record.create_time == record.update_time
    assert catalogue.get("x") == record
    assert catalogue.resolve("x") == Resolved(C.digest, 200, "acme", "ready", 100)
    assert catalogue.pinned() == {C.digest: 200}
    assert catalogue.counts() == Counts(1, 1, 1, 100)
    assert (catalogue.exists("x"), catalogue.exists("y")) == (True, False)


def test_options_change_by_themselves(catalogue: Catalogue, packer: Packer) -> None:
    first = catalogue.put(entry("x", A, labels={"k": "v"}, tenant="acme"), packer.places(A))
    assert catalogue.put(entry("x", A), {}) == first
    assert catalogue.update("x", pinned=None, labels=None) == first
    moved = catalogue.put(entry("x", A, tenant=""), {})
    assert (moved.tenant, moved.labels) == ("", {"k": "v"})
    changed = catalogue.update("x", pinned=True, labels={}, etag=moved.etag)
    assert (changed.pinned, changed.labels, changed.tenant) == (True, {}, "")
    assert len({first.etag, moved.etag, changed.etag}) == 3
    assert first.update_time < moved.update_time < changed.update_time
    for call in (catalogue.delete, catalogue.activate):
        with pytest.raises(EtagMismatch) as caught:
            call("x", etag=first.etag)
        assert caught.value.metadata["etag"] == changed.etag


def test_nothing_is_said_of_unknown_ids(catalogue: Catalogue) -> None:
    for call in (catalogue.get, catalogue.delete, catalogue.activate, catalogue.resolve):
        with pytest.raises(AdapterNotFound, match="there is no adapter x") as caught:
            call("x")
        assert caught.value.metadata == {"adapter": "x"}
    with pytest.raises(AdapterNotFound):
        catalogue.resolve("x", "0" * 12)


def test_create_only_and_validate_only(catalogue: Catalogue, packer: Packer) -> None:
    would_be = catalogue.put(entry("x", B, validate_only=True), {})
    assert (would_be.digest, would_be.size_bytes) == (B.digest, 200)
    assert catalogue.counts() == Counts(0, 0, 0, 0)
    catalogue.put(entry("x", A, create_only=True), packer.places(A))
    with pytest.raises(AdapterExists):
        catalogue.put(entry("x", B, create_only=True), packer.places(B))
    assert catalogue.place_of(B.digest) is None


def test_content_without_a_place_is_refused(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put(entry("x", A), packer.places(A))
    for places in ({}, {B.digest: packer.place()}):
        with pytest.raises(StoreFailed, match="its content is not stored"):
            catalogue.put_many([entry("y", C), entry("x", B)], {C.digest: packer.place(), **places})
    assert catalogue.get("x").versions == (A.digest,)
    assert catalogue.count() == 1


def test_many_at_once(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put(entry("old", A, tenant="t"), packer.places(A))
    entries = [
        entry("new", B),
        entry("old", A),
        entry("old", A, create_only=True),
        entry("new", A, labels={"k": "v"}),
        entry("new", A, labels={"k": "v"}),
        entry("old", B, tenant=""),
    ]
    outcomes = catalogue.put_many(entries, packer.places(B))
    assert [one.outcome for one in outcomes] == ["created", "unchanged", "exists", "updated", "unchanged", "updated"]
    assert outcomes[3] == Outcome("new", A.digest, "updated")
    assert catalogue.get("new").versions == catalogue.get("old").versions[::-1] == (A.digest, B.digest)
    assert catalogue.get("new").labels == {"k": "v"}
    assert catalogue.counts() == Counts(2, 2, 4, 500)
    assert catalogue.put_many([], {}) == []


def test_versions_by_prefix(catalogue: Catalogue, packer: Packer) -> None:
    near = [replace(A, digest="ab" * 6 + end * 52) for end in "0cf"]
    for one in near:
        catalogue.put(entry("x", one), packer.places(one))
    for one in near:
        assert catalogue.resolve("x", one.digest[:13]).digest == one.digest
        assert catalogue.activate("x", one.digest).digest == one.digest
    for call in (catalogue.resolve, catalogue.activate):
        with pytest.raises(InvalidRequest, match="begins several versions"):
            call("x", "ab" * 6)
        with pytest.raises(AdapterNotFound, match="no version abababababab1"):
            call("x", "ab" * 6 + "1")


def test_activate_and_back(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put(entry("x", A), packer.places(A))
    with pytest.raises(AdapterNotFound, match="before the current one"):
        catalogue.activate("x")
    for one in (B, C):
        catalogue.put(entry("x", one), packer.places(one))
    history = (C.digest, B.digest, A.digest)
    first = catalogue.activate("x", A.digest[:12])
    assert (first.digest, first.versions, first.size_bytes) == (A.digest, history, 100)
    assert catalogue.activate("x", A.digest[:12]) == first
    back = catalogue.activate("x", etag=first.etag)
    assert (back.digest, back.family, back.versions) == (C.digest, "lora", history)
    assert catalogue.activate("x").digest == A.digest
    assert [r.id for r in catalogue.page(Listing(9, 'family = "loca"')).records] == ["x"]


def test_prune_keeps_the_newest_and_the_current(catalogue: Catalogue, packer: Packer) -> None:
    for one in (A, B, C):
        catalogue.put(entry("x", one), packer.places(one))
    catalogue.put(entry("y", B), {})
    catalogue.activate("x", A.digest)
    assert catalogue.prune_many(["x"], 3) == Freed(())
    assert catalogue.prune_many(["x"], 0) == Freed((C.digest,))
    assert catalogue.get("x").versions == (A.digest,)
    with pytest.raises(AdapterNotFound):
        catalogue.activate("x")


def test_prune_many(catalogue: Catalogue, packer: Packer) -> None:
    """What several had and none has any more is freed, once; who is not there is passed over."""
    for one in (A, B):
        catalogue.put_many([entry("x", one), entry("y", one), entry("z", one)], packer.places(one))
    assert catalogue.prune_many(["x", "nobody", "y"], 1) == Freed(())
    assert catalogue.prune_many(["z", "x"], 1) == Freed((A.digest,))
    assert [catalogue.get(name).versions for name in "xyz"] == [(B.digest,)] * 3


def test_outcomes_say_who_is_pinned(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put(entry("x", A, pinned=True), packer.places(A))
    entries = [entry("x", B), entry("y", B), entry("z", B, pinned=True), entry("x", B, pinned=False)]
    assert [one.pinned for one in catalogue.put_many(entries, packer.places(B))] == [True, False, True, False]


def test_what_is_freed_is_known_until_it_is_released(catalogue: Catalogue, packer: Packer) -> None:
    places = packer.places(A, B)
    catalogue.put_many([entry("x", A), entry("y", B), entry("z", B)], places)
    assert catalogue.delete("y") == Freed(())
    assert catalogue.delete("z") == Freed((B.digest,)) == Freed(catalogue.unused())
    assert not catalogue.refers_to(B.digest)
    assert catalogue.place_of(B.digest) == places[B.digest]
    left = catalogue.release([B.digest, A.digest, digest("nobody")])
    assert dict(left) == {name: places[name] for name in (B.digest, digest("places"))}
    assert catalogue.refers_to(A.digest)
    assert catalogue.refers_to(digest("layout"))
    catalogue.delete("x")
    assert {name for name, _ in catalogue.release(catalogue.unused())} == {A.digest, digest("layout")}
    assert catalogue.counts() == Counts(0, 0, 0, 0)
    catalogue.put(entry("x", B), packer.places(B))


def test_content_that_comes_back_is_not_released(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put(entry("x", A), packer.places(A))
    freed = catalogue.delete("x")
    catalogue.put(entry("y", A), {})
    assert catalogue.release(freed.versions) == []
    assert catalogue.resolve("y").digest == A.digest


def test_a_release_that_is_refused_forgets_nothing(catalogue: Catalogue, packer: Packer) -> None:
    places = packer.places(A)
    catalogue.put(entry("x", A), places)
    catalogue.delete("x")
    told: list[object] = []

    def refuse(leaving: object) -> None:
        told.append(leaving)
        raise OSError("no")

    with pytest.raises(StoreFailed):
        catalogue.release([A.digest], refuse)
    assert told == [[(A.digest, places[A.digest]), (digest("layout"), places[digest("layout")])]]
    assert catalogue.place_of(A.digest) == places[A.digest]


def test_quarantine(catalogue: Catalogue, packer: Packer) -> None:
    catalogue.put_many([entry("x", A), entry("y", B)], packer.places(A, B))
    before = catalogue.get("x")
    catalogue.quarantine(A.digest)
    catalogue.quarantine(digest("nobody"))
    assert catalogue.get("x") == replace(before, state="quarantined")
    assert catalogue.resolve("x").state == "quarantined"
    assert [r.id for r in catalogue.page(Listing(9, 'state = "quarantined"')).records] == ["x"]
    assert [r.id for r in catalogue.page(Listing(9, 'state = "ready"')).records] == ["y"]
    catalogue.heal(A.digest)
    assert catalogue.get("x") == before
    catalogue.quarantine(A.digest)
    place = packer.place()
    assert catalogue.put(entry("x", A), {A.digest: place}) == before
    assert catalogue.place_of(A.digest) == place


def test_last_use(catalogue: Catalogue, packer: Packer) -> None:
    before = catalogue.put(entry("x", A), packer.places(A))
    catalogue.touch({"x": 1_700_000_000_000_001, "nobody": 5})
    catalogue.touch({"x": 1_600_000_000_000_000})
    after = catalogue.get("x")
    assert after == replace(before, last_used_time=datetime.fromtimestamp(1_700_000_000, UTC).replace(microsecond=1))


def test_packs(catalogue: Catalogue) -> None:
    index: BlobIndex = catalogue
    own, packed, other = version("own", size=5000), version("packed"), version("other", size=10)
    places = {
        own.digest: Place(OWN_FILE, 0, 5000),
        packed.digest: Place(1, 0, 100),
        other.digest: Place(1, 152, 10),
    }
    entries = [entry(name, one) for name, one in (("own", own), ("packed", packed), ("other", other))]
    catalogue.put_many(entries, places)
    assert index.packs() == [PackFacts(1, places[other.digest].end, 110, 2)]
    assert index.live_in(1, -1, 1) == [(packed.digest, places[packed.digest])]
    assert index.live_in(1, 0, 9) == [(other.digest, places[other.digest])]
    assert index.live_in(OWN_FILE, -1, 9) == []
    assert index.own_files("", 9) == [(own.digest, places[own.digest])]
    assert index.own_files(own.digest, 9) == []
    to = Place(2, 64, 100)
    index.move([(packed.digest, places[packed.digest], to), (other.digest, Place(1, 8, 10), Place(2, 512, 10))])
    assert (index.place_of(packed.digest), index.place_of(other.digest)) == (to, places[other.digest])
    assert not index.drop_pack(1)
    catalogue.delete("other")
    index.release([other.digest], lambda leaving: None)
    assert index.packs() == [PackFacts(1, places[other.digest].end, 0, 0), PackFacts(2, to.end, 100, 1)]
    assert index.drop_pack(1)
    assert not index.drop_pack(1)
    assert catalogue.counts() == Counts(2, 2, 2, 5100)


def test_kinds_go_with_their_last_version(catalogue: Catalogue, packer: Packer) -> None:
    for number in range(20):
        kind = replace(KINDS[0], base_model_name_or_path=f"name {number}")
        one = replace(version(f"v{number}"), kind=kind)
        assert catalogue.put(entry("x", one), packer.places(one)).base_model_name_or_path == f"name {number}"
        catalogue.release(catalogue.prune_many(["x"], 1).versions)
    with catalogue._connections.reading() as db:
        assert db.execute("SELECT count(*) FROM kinds").fetchone() == (1,)


def test_readers_and_writers_at_once(catalogue: Catalogue, packer: Packer) -> None:
    """Every answer is that of some moment: an id's current version is among its versions, a page has no id twice."""
    versions = [version(f"v{number}", "layout") for number in range(4)]
    catalogue.put_many([entry(f"id{i}", versions[0]) for i in range(10)], packer.places(*versions))
    stop = threading.Event()

    def write() -> None:
        for step in range(60):
            one = versions[step % 4]
            catalogue.put_many([entry(f"id{i}", one) for i in range(10)], packer.places(one))
            catalogue.prune_many([f"id{step % 10}", "nobody"], 2)

    def read() -> int:
        answers = 0
        while not stop.is_set():
            record = catalogue.get(f"id{answers % 10}")
            assert record.digest in record.versions
            digests = {record.digest for record in catalogue.page(Listing(10)).records}
            assert len(digests) == 1  # of one transaction
            answers += 1
        return answers

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            pool.submit(write).result()
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
