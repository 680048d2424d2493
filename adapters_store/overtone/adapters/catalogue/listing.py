"""One page of a listing, by an amount of work that does not grow with the catalogue.

Where an index finds what the filter allows in the order that is asked for, the page is read from it. Else the comparison
that allows the fewest adapters is looked for: if they are at most 10,000, they are found by its index and sorted. If every
comparison allows more, adapters are tested one after another in the order, at most 10,000 of them, and the page may be
short.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterable
from itertools import chain
from operator import itemgetter

from overtone.adapters.catalogue.filters import Filter, IdRange, parse_filter
from overtone.adapters.catalogue.rows import records
from overtone.adapters.catalogue.selecting import (
    ALL,
    COLUMNS,
    Condition,
    Parameters,
    conditions,
    count_up_to,
    in_range,
    tested,
)
from overtone.adapters.paging import Listing, Page, Position

EXAMINED = 10_000
"""Adapters that are tested or sorted for one page."""

_LARGEST_NUMBER = (1 << 63) - 1

Row = tuple[str | int, int, int]
"""(value in the order, number, whether the filter allows it)"""

_key = itemgetter(0, 1)


def page(db: sqlite3.Connection, listing: Listing) -> Page:
    """Raises `InvalidRequest` for a filter that is none."""
    keys: list[tuple[str | int, int]] = []
    following = None
    for examined, (value, number, allowed) in enumerate(_rows(db, listing, parse_filter(listing.filter)), 1):
        if allowed and len(keys) == listing.size:
            following = Position(*keys[-1])
            break
        if allowed:
            keys.append((value, number))
        if examined == EXAMINED:
            following = Position(value, number)
            break
    return Page(records(db, [number for _, number in keys]), following)


def _rows(db: sqlite3.Connection, listing: Listing, chosen: Filter) -> Iterable[Row]:
    """In order, from behind `listing.after`; those that are allowed and perhaps others, some of them or all."""
    field = listing.order.field
    found = conditions(db, chosen, field)
    through = next((c for c in found if c.search is not None and field in c.search.ordered), None)
    if len(found) > 1 or through is None:
        through = _fewest(db, found) or through
    remaining = [condition for condition in found if condition is not through]
    search = through.search if through is not None and through.search is not None else ALL
    sorts = field not in search.ordered
    source = search.source if sorts else search.ordered[field]
    column = search.id if field == "id" else COLUMNS[field]
    test, tested_with = tested(remaining)
    query = f"SELECT {column}, a.adapter, {test} FROM {source} WHERE {search.where} AND"
    parts = [
        [(f"{query} {bound}", (*tested_with, *one, *bounded_by)) for one in search.parameters]
        for bound, bounded_by in _behind(listing, column, chosen.ids)
    ]
    if sorts:
        rows = [row for part in parts for text, parameters in part for row in db.execute(text, parameters)]
        return sorted(rows, key=_key, reverse=listing.order.descending)
    ending, limit = f" ORDER BY {_ordering(listing, column)} LIMIT ?", EXAMINED if remaining else listing.size + 1
    return chain.from_iterable(
        heapq.merge(
            *(db.execute(text + ending, (*parameters, limit)) for text, parameters in part),
            key=_key,
            reverse=listing.order.descending,
        )
        for part in parts
    )


def _fewest(db: sqlite3.Connection, found: Iterable[Condition]) -> Condition | None:
    """The condition that allows the fewest adapters, if they are few enough."""
    counted = [(count_up_to(db, c.search, EXAMINED + 1), c) for c in found if c.search is not None]
    count, condition = min(counted, key=itemgetter(0), default=(0, None))
    return condition if count <= EXAMINED else None


def _behind(listing: Listing, column: str, ids: IdRange) -> list[tuple[str, Parameters]]:
    """What bounds the column, so that an index is searched and not scanned: one after another, the parts of what is behind
    `listing.after`."""
    after, descending = listing.after, listing.order.descending
    if listing.order.field == "id":
        if after is not None:
            ids = ids.and_to(str(after.value), True) if descending else ids.and_from(str(after.value), True)
        return [in_range(column, ids)]
    operator, end = ("<", _LARGEST_NUMBER) if descending else (">", -1)
    if after is None:
        return [(f"{column} {operator} ?", (end,))]
    if listing.order.field == "create_time":
        return [(f"{column} {operator} ?", (after.number,))]
    # A comparison of both at once would search by the value alone, and thousands may have the same.
    same = f"{column} = ? AND a.adapter {operator} ?", (after.value, after.number)
    return [same, (f"{column} {operator} ?", (after.value,))]


def _ordering(listing: Listing, column: str) -> str:
    direction = "DESC" if listing.order.descending else "ASC"
    if listing.order.field in ("id", "create_time"):
        return f"{column} {direction}"
    return f"{column} {direction}, a.adapter {direction}"
