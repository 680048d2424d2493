"""Pages of a long list: what is asked for, in which order, and where the next page begins."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

from overtone.adapters.records import AdapterRecord, check_id
from overtone.adapters.text import shown
from overtone.errors import InvalidRequest

_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_LARGEST_NUMBER = (1 << 63) - 1

OrderField = Literal["id", "create_time", "update_time", "last_used_time", "size_bytes"]


@dataclass(frozen=True, slots=True)
class Order:
    """Adapters that are equal in `field` come in the order in which they were created; `descending` turns all around."""

    field: OrderField = "id"
    descending: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """A place in an ordered list: the value by which it is ordered and the adapter's number."""

    value: str | int
    number: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Up to `size` adapters of those in `filter` (see `overtone.adapters.catalogue.filters`), from behind `after`."""

    size: int
    filter: str = ""
    order: Order = Order()
    after: Position | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """`next`: None for the last one. A page that is not the last may have fewer records than were asked for, even none."""

    records: list[AdapterRecord]
    next: Position | None


def parse_order(text: str) -> Order:
    """Of "<field>" or "<field> desc"; "" is "id". Raises `InvalidRequest`."""
    name, _, direction = text.strip().partition(" ")
    for field in get_args(OrderField):
        if name == field and direction.strip() in ("", "asc", "desc"):
            return Order(field, direction.strip() == "desc")
    if not text.strip():
        return Order()
    message = f'order_by must be one of {", ".join(get_args(OrderField))}, perhaps with " desc", not {shown(text)!r}'
    raise InvalidRequest(message, field="order_by")


def check_page_size(page_size: int) -> int:
    """How many records a page has: 100 for 0, at most 1000; `InvalidRequest` if negative."""
    if page_size < 0:
        raise InvalidRequest(f"page_size is {page_size}, less than 0", field="page_size")
    return min(page_size or _DEFAULT_PAGE, _LARGEST_PAGE)


def make_page_token(listing: Listing, position: Position | None) -> str:
    """Opaque to clients: the listing, and where its next page begins. "" after the last page."""
    if position is None:
        return ""
    text = json.dumps([*_signature(listing), position.value, position.number], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode()


def parse_page_token(token: str, listing: Listing) -> Position | None:
    """Where `listing` goes on, None for the first page.

    Raises `InvalidRequest` for a token that we did not make, or made for another filter or order.
    """
    if not token:
        return None
    problem = f"{shown(token)!r} is no page token"
    try:
        *signature, value, number = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if signature != _signature(listing):
            problem = "the page token belongs to another filter or order_by"
            raise ValueError
        return Position(check_id(value) if listing.order.field == "id" else _number(value), _number(number))
    except (ValueError, TypeError, RecursionError, InvalidRequest) as error:
        raise InvalidRequest(problem, field="page_token") from error


def _signature(listing: Listing) -> list[object]:
    filter_hash = hashlib.sha256(listing.filter.encode(errors="surrogatepass")).hexdigest()[:16]
    return [listing.order.field, listing.order.descending, filter_hash]


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= _LARGEST_NUMBER:
        raise ValueError
    return value
