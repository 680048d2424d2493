"""From a filter to SQL: for each of its comparisons a test of one adapter, and where there is one, an index that finds all.

Every query names the index that it goes through, so that no statistics are needed to plan it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from overtone.adapters.catalogue.filters import Filter, IdRange
from overtone.adapters.paging import OrderField

Parameters = tuple[str | int, ...]

COLUMNS: Mapping[OrderField, str] = {
    "create_time": "a.adapter",
    "update_time": "a.update_time",
    "last_used_time": "a.used_time",
    "size_bytes": "a.size_bytes",
}
"""Of all orders but that of ids, the column of which depends on the search."""


def _through(index: str) -> str:
    return f"adapters AS a INDEXED BY {index}"


ORDERED: Mapping[OrderField, str] = {
    "id": _through("adapters_by_id"),
    "create_time": "adapters AS a NOT INDEXED",
    "update_time": _through("adapters_by_update_time"),
    "last_used_time": _through("adapters_by_used_time"),
    "size_bytes": _through("adapters_by_size"),
}
"""All adapters, in each order."""

_TENANTS: Mapping[OrderField, str] = {
    "id": _through("tenants_by_id"),
    "create_time": _through("tenants_by_create_time"),
    "update_time": _through("tenants_by_update_time"),
    "last_used_time": _through("tenants_by_used_time"),
    "size_bytes": _through("tenants_by_size"),
}


@dataclass(frozen=True, slots=True)
class Search:
    """Finds all adapters that a comparison allows. `source`, `where`: the parts of a query; it is made once for each of
    `parameters`, and together they find each adapter once. `ordered`: sources that find them in an order. `id`: the column
    of the ids."""

    source: str
    where: str
    parameters: tuple[Parameters, ...]
    ordered: Mapping[OrderField, str] = field(default_factory=dict)
    id: str = "a.id"


ALL = Search(ORDERED["id"], "1", ((),), ORDERED)


@dataclass(frozen=True, slots=True)
class Condition:
    """`test`: whether the adapter `a` is allowed."""

    test: str
    parameters: Parameters
    search: Search | None = None


def conditions(db: sqlite3.Connection, chosen: Filter, order: OrderField) -> list[Condition]:
    """Of all but the range of ids in the order of ids, which bounds whatever is searched."""
    found = [_label(key, value) for key, value in chosen.labels]
    if chosen.family is not None or chosen.base_fingerprint is not None:
        found.append(_classes(db, chosen))
    if chosen.tenant is not None:
        found.append(_tenant(chosen.tenant))
    if chosen.pinned is not None:
        search = Search(_through("adapters_pinned"), "a.pinned = 1", ((),), {"id": _through("adapters_pinned")})
        found.append(Condition("a.pinned = ?", (int(chosen.pinned),), search if chosen.pinned else None))
    if chosen.state is not None:
        found.append(_state(chosen.state == "quarantined"))
    if chosen.ids != IdRange() and order != "id":
        where, parameters = in_range("a.id", chosen.ids)
        found.append(Condition(where, parameters, Search(_through("adapters_by_id"), where, (parameters,))))
    return found


def in_range(column: str, ids: IdRange) -> tuple[str, Parameters]:
    low = f"{column} {'>' if ids.low_open else '>='} ?"
    if ids.high is None:
        return low, (ids.low,)
    return f"{low} AND {column} {'<' if ids.high_open else '<='} ?", (ids.low, ids.high)


def _label(key: str, value: str) -> Condition:
    test = "EXISTS (SELECT 1 FROM labels AS x WHERE x.key = ? AND x.value = ? AND x.id = a.id)"
    source = "labels AS l CROSS JOIN adapters AS a INDEXED BY adapters_by_id ON a.id = l.id"
    search = Search(source, "l.key = ? AND l.value = ?", ((key, value),), {"id": source}, id="l.id")
    return Condition(test, (key, value), search)


def _classes(db: sqlite3.Connection, chosen: Filter) -> Condition:
    named = {"family": chosen.family, "base_fingerprint": chosen.base_fingerprint}
    given = {column: value for column, value in named.items() if value is not None}
    query = f"SELECT class FROM classes WHERE {' AND '.join(f'{column} = ?' for column in given)}"
    classes = tuple(row[0] for row in db.execute(query, tuple(given.values())))
    source = _through("adapters_by_class")
    search = Search(source, "a.class = ?", tuple((one,) for one in classes), {"id": source})
    return Condition(f"a.class IN ({', '.join('?' * len(classes))})", classes, search)


def _tenant(tenant: str) -> Condition:
    if not tenant:
        return Condition("a.tenant IS NULL", ())
    return Condition("a.tenant = ?", (tenant,), Search(_TENANTS["id"], "a.tenant = ?", ((tenant,),), _TENANTS))


def _state(quarantined: bool) -> Condition:
    test = "EXISTS (SELECT 1 FROM blobs AS x WHERE x.blob = a.version AND x.quarantined = 1)"
    if not quarantined:
        return Condition(f"NOT {test}", ())
    source = (
        "blobs AS b INDEXED BY blobs_quarantined CROSS JOIN adapters AS a INDEXED BY adapters_by_version "
        "ON a.version = b.blob"
    )
    return Condition(test, (), Search(source, "b.quarantined = 1", ((),)))


def tested(remaining: Iterable[Condition]) -> tuple[str, Parameters]:
    """All of `remaining` as one expression."""
    chosen = list(remaining)
    test = " AND ".join(condition.test for condition in chosen) or "1"
    return test, tuple(parameter for condition in chosen for parameter in condition.parameters)


def count_up_to(db: sqlite3.Connection, search: Search, limit: int) -> int:
    """How many adapters a search finds; looks at no more than `limit` of each of its parameters."""
    query = f"SELECT count(*) FROM (SELECT 1 FROM {search.source} WHERE {search.where} LIMIT ?)"
    return sum(int(db.execute(query, (*one, limit)).fetchone()[0]) for one in search.parameters)
