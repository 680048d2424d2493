"""What a filter says, and where it is wrong."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.adapters.catalogue.filters import Filter, IdRange, parse_filter
from overtone.adapters.paging import Listing, Order, Position, make_page_token, parse_order, parse_page_token
from overtone.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", Filter()),
        ("  ", Filter()),
        ('family = "loca"', Filter(family="loca")),
        ('tenant="" AND pinned=false', Filter(tenant="", pinned=False)),
        ('state = "quarantined" AND base_fingerprint = "ab"', Filter(state="quarantined", base_fingerprint="ab")),
        ('labels.team-1 = "x" AND labels."a \\"b" = "\\\\"', Filter(labels=(("team-1", "x"), ('a "b', "\\")))),
        ('id = "a"', Filter(ids=IdRange("a", False, "a", False))),
        ('id : "ab*"', Filter(ids=IdRange("ab", False, "ab\x7f", True))),
        ('id >= "b" AND id < "d" AND id > "b"', Filter(ids=IdRange("b", True, "d", True))),
        ('id <= "d" AND id > "a" AND id >= "a" AND id < "d"', Filter(ids=IdRange("a", True, "d", True))),
    ],
)
def test_what_is_meant(text: str, meaning: Filter) -> None:
    assert parse_filter(text) == meaning


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("famly = 1", 1, "expected id, family"),
        ("family", 7, 'expected "=" at character 7, not the end'),
        ('family > "a"', 8, "the only comparison for 'family'"),
        ("family = loca", 10, "a value in quotes"),
        ('family = "loca', 10, "a value in quotes"),
        ('family = "a" OR family = "b"', 14, "AND or the end"),
        ('family = "a" AND ', 18, "not the end"),
        ('family = "a" ANDfamily = "b"', 14, "AND or the end"),
        ('family = "a" AND family = "b"', 18, "'family' no second time"),
        ('labels.a = "1" AND labels."a" = "2"', 20, "'a' no second time"),
        ('labels = "a"', 8, "after labels"),
        ('labels.ä = "a"', 8, "a key"),
        ('pinned = "true"', 10, "true or false"),
        ('state = "broken"', 9, '"ready" or "quarantined"'),
        ('id : "a*b*"', 6, 'one "*"'),
        ('id : "a"', 6, 'one "*"'),
        ('id "a"', 4, "one of = < <="),
        ('tenant = "a\nb"', 10, "printable"),
        (" AND ".join(f'labels.k{i} = "v"' for i in range(17)), 327, "at most 16"),
    ],
)
def test_where_it_is_wrong(text: str, position: int, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_filter(text)
    assert message in str(caught.value)
    assert caught.value.field == "filter"
    assert caught.value.metadata["position"] == str(position)
    assert f"at character {position}" in str(caught.value)


def test_too_long() -> None:
    with pytest.raises(InvalidRequest, match="4097 characters"):
        parse_filter(" " * 4097)


def refused(call: Callable[[], object]) -> str | None:
    """The field that an `InvalidRequest` names; None without one."""
    try:
        call()
    except InvalidRequest as error:
        return error.field
    return None


@given(st.text(max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    assert refused(lambda: parse_filter(text)) in (None, "filter")


printable = st.text(max_size=20).filter(str.isprintable)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.dictionaries(printable, printable, max_size=4), printable)
def test_any_value_can_be_asked_for(labels: dict[str, str], family: str) -> None:
    terms = [f"labels.{quoted(key)} = {quoted(value)}" for key, value in labels.items()]
    text = " AND ".join([*terms, f"family = {quoted(family)}"])
    assert parse_filter(text) == Filter(family=family, labels=tuple(labels.items()))


def test_orders() -> None:
    assert parse_order("") == parse_order(" ") == parse_order("id") == parse_order("id asc") == Order()
    assert parse_order("last_used_time  desc ") == Order("last_used_time", descending=True)
    for bad in ("name", "id down", "id desc desc", "id,size_bytes", "ID"):
        with pytest.raises(InvalidRequest) as caught:
            parse_order(bad)
        assert caught.value.field == "order_by"


@pytest.mark.parametrize(
    ("order", "position"), [(Order(), Position("a.b", 3)), (Order("size_bytes", descending=True), Position(0, 1 << 62))]
)
def test_page_tokens(order: Order, position: Position) -> None:
    listing = Listing(3, 'family = "loca"', order)
    token = make_page_token(listing, position)
    assert parse_page_token(token, listing) == position
    assert parse_page_token("", listing) is None
    assert make_page_token(listing, None) == ""
    for other in (Listing(3, "", order), Listing(3, listing.filter, Order("create_time"))):
        with pytest.raises(InvalidRequest, match="another filter or order_by"):
            parse_page_token(token, other)


@given(st.text(max_size=80) | st.binary(max_size=60).map(lambda raw: raw.hex()))
def test_any_other_token_is_refused(token: str) -> None:
    assert refused(lambda: parse_page_token(token, Listing(3))) == ("page_token" if token else None)


@pytest.mark.parametrize("value", ['"../x"', "3", "null", "[]"])
def test_a_forged_position_is_refused(value: str) -> None:
    listing = Listing(3)
    text = base64.urlsafe_b64decode(make_page_token(listing, Position("a", 1))).decode()
    for forged in (text.replace('"a"', value), text.replace(",1]", f",{1 << 70}]"), text.replace(",1]", "]")):
        with pytest.raises(InvalidRequest) as caught:
            parse_page_token(base64.urlsafe_b64encode(forged.encode()).decode(), listing)
        assert caught.value.field == "page_token"
