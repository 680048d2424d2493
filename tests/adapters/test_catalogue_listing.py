"""Pages: right by comparison with sorting everything, and read from indexes only."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest

from overtone.adapters.catalogue import Catalogue, listing
from overtone.adapters.packs import Place
from overtone.adapters.paging import Listing, Order, OrderField, Position
from overtone.adapters.records import AdapterRecord
from support.catalogues import Packer, all_pages, entry, in_order, version

ORDERS = [Order(field, descending) for field in get_args(OrderField) for descending in (False, True)]

Test = Callable[[AdapterRecord], bool]
TERMS: dict[str, Test] = {
    'family = "loca"': lambda r: r.family == "loca",
    f'base_fingerprint = "{"e" * 64}"': lambda r: r.base_fingerprint == "e" * 64,
    'tenant = "acme"': lambda r: r.tenant == "acme",
    'tenant = ""': lambda r: r.tenant == "",
    'state = "quarantined"': lambda r: r.state == "quarantined",
    'state = "ready"': lambda r: r.state == "ready",
    "pinned = true": lambda r: r.pinned,
    "pinned = false": lambda r: not r.pinned,
    'labels.team = "blue"': lambda r: r.labels.get("team") == "blue",
    'labels."no such" = "x"': lambda r: False,
    'family = "vera"': lambda r: False,
    'id : "a-1*"': lambda r: r.id.startswith("a-1"),
    'id > "a-03" AND id <= "a-20"': lambda r: "a-03" < r.id <= "a-20",
}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    """Forty adapters, no two fields of which go together; many share their sizes and times."""
    random.seed(6)
    opened = Catalogue(tmp_path_factory.mktemp("listing") / "catalogue.sqlite3")
    packer = Packer()
    versions = [version(f"v{i}", kind=i % 3, size=100 * (i % 4)) for i in range(12)]
    ids = [f"a-{i:02}" for i in range(40)]
    random.shuffle(ids)
    for start in range(0, 40, 8):
        entries = [
            entry(
                adapter_id,
                random.choice(versions),
                pinned=random.random() < 0.3,
                tenant=random.choice(["", "acme", "bravo"]),
                labels=random.choice([{}, {"team": "blue"}, {"team": "red", "x": "y"}]),
            )
            for adapter_id in ids[start : start + 8]
        ]
        opened.put_many(entries, packer.places(*versions))
    for adapter_id in random.sample(ids, 12):
        opened.put(entry(adapter_id, random.choice(versions)), {})
    opened.touch({adapter_id: random.randrange(1, 5) for adapter_id in random.sample(ids, 20)})
    opened.quarantine(versions[0].digest)
    opened.quarantine(versions[7].digest)
    yield opened
    opened.close()


def created(catalogue: Catalogue) -> list[AdapterRecord]:
    with catalogue._connections.reading() as db:
        ids = [row[0] for row in db.execute("SELECT id FROM adapters ORDER BY adapter")]
    return [catalogue.get(adapter_id) for adapter_id in ids]


@pytest.mark.parametrize("examined", [10_000, 3], ids=["sorted", "tested"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_filter_in_every_order(
    catalogue: Catalogue, order: Order, examined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """examined: with 3, nothing is small enough to be sorted."""
    monkeypatch.setattr(listing, "EXAMINED", examined)
    records = created(catalogue)
    for terms in [[], *([one] for one in TERMS), *(random.sample(list(TERMS), k) for k in (2, 2, 2, 3, 3))]:
        fields = [term.split(" ")[0] for term in terms]
        if len(set(fields)) < len(fields):
            continue
        wanted = in_order([r for r in records if all(TERMS[term](r) for term in terms)], order)
        for size in (1, 7, 50):
            found = all_pages(catalogue, Listing(size, " AND ".join(terms), order))
            assert found == wanted, (terms, size)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("term", ["", *TERMS])
def test_pages_are_read_from_indexes(catalogue: Catalogue, term: str, order: Order) -> None:
    """SQLite neither scans a table or an index nor sorts."""
    queries: list[str] = []
    with catalogue._connections.snapshot() as db:
        db.set_trace_callback(queries.append)
        first = listing.page(db, Listing(2, term, order))
        listing.page(db, Listing(2, term, order, first.next))
        db.set_trace_callback(None)
        for query in queries:
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}")]
            bad = [step for step in plan if ("SCAN" in step and "(subquery" not in step) or "B-TREE" in step]
            assert not bad, (query, plan)
    assert len(queries) >= 2


def steps_of(db: sqlite3.Connection, asked: Listing) -> int:
    """Of SQLite's machine."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    db.set_progress_handler(count, 1)
    listing.page(db, asked)
    db.set_progress_handler(None, 1)
    return steps


def test_a_page_costs_the_same_in_a_larger_catalogue(tmp_path: Path) -> None:
    """The first one and one from the middle, where all sizes and times are the same."""
    costs: list[dict[object, int]] = []
    for number in (1_000, 4_000):
        opened = Catalogue(tmp_path / f"{number}.sqlite3")
        contents = [version(f"v{i}", kind=i % 3) for i in range(number)]
        entries = [
            entry(f"a-{i:06}", one, tenant=("", "acme")[i % 2], labels={"team": ("blue", "red")[i % 2]})
            for i, one in enumerate(contents)
        ]
        opened.put_many(entries, {one.digest: Place(1, 200 * i, 100) for i, one in enumerate(contents)})
        middle = opened.get(f"a-{number // 2 + 1:06}")
        values = {"id": middle.id, "create_time": number // 2, "last_used_time": 0, "size_bytes": 100}
        stamp = (middle.update_time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        costs.append({})
        with opened._connections.reading() as db:
            for term in ("", 'family = "loca"', 'tenant = "acme"', 'labels.team = "blue"', 'id : "a-0*"'):
                for order in ORDERS:
                    if term in ("", 'tenant = "acme"') or order.field == "id":
                        middle_one = Position(values.get(order.field, stamp), number // 2)
                        for after in (None, middle_one):
                            steps = steps_of(db, Listing(10, term, order, after))
                            costs[-1][term, order, after is None] = steps
        opened.close()
    for key, steps in costs[0].items():
        assert costs[1][key] <= 1.2 * steps, key


def test_where_no_index_serves_a_page_costs_a_bounded_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "EXAMINED", 50)
    opened = Catalogue(tmp_path / "catalogue.sqlite3")
    contents = [version(f"v{i}", kind=i % 3) for i in range(3000)]
    entries = [entry(f"a-{i:06}", one, pinned=i < 1000) for i, one in enumerate(contents)]
    opened.put_many(entries, {one.digest: Place(1, 200 * i, 100) for i, one in enumerate(contents)})
    with opened._connections.reading() as db:
        for text in (
            "pinned = true",
            "pinned = false",
            'pinned = true AND family = "lora"',
            'tenant = "" AND pinned = true',
        ):
            for order in ORDERS:
                assert steps_of(db, Listing(10, text, order)) < 100 * 50, (text, order)
    found = all_pages(opened, Listing(10, 'pinned = true AND family = "lora"', Order("size_bytes", descending=True)))
    assert [record.id for record in found] == [f"a-{i:06}" for i in range(998, 0, -3)]
    opened.close()
