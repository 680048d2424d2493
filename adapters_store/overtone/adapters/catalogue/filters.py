"""What a listing is to contain: a conjunction of comparisons, as AIP-160 writes them.

filter     = [ comparison { "AND" comparison } ]
comparison = ( "family" | "tenant" | "state" | "base_fingerprint" | "labels." key ) "=" text
           | "pinned" "=" ( "true" | "false" )
           | "id" ( "=" | "<" | "<=" | ">" | ">=" ) text
           | "id" ":" text             the ids that begin with what stands before the "*" at the end of the text
key        = letters, digits, "_" and "-", or a text
text       = '"' ... '"', in which a backslash makes the next character stand for itself
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NoReturn

from overtone.adapters.records import AdapterState
from overtone.adapters.text import shown
from overtone.errors import InvalidRequest

_LONGEST, _MOST_COMPARISONS = 4096, 16
_FIELD, _DOT, _KEY = re.compile(r"[a-z_]+"), re.compile(r"\."), re.compile(r"[A-Za-z0-9_-]+")
_TEXT, _OPERATOR, _BOOLEAN = re.compile(r'"((?:[^"\\]|\\.)*)"'), re.compile(r"<=|>=|[=<>:]"), re.compile(r"true|false")
_AND = re.compile(r"AND(?![A-Za-z0-9_])")
_STATES: dict[str, AdapterState] = {"ready": "ready", "quarantined": "quarantined"}
_FIELDS = "id, family, tenant, state, pinned, base_fingerprint or labels.<key>"
_AFTER_ALL_IDS = "\x7f"
"""Comes after every character of an id."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """Ids from `low` to `high`, which is None for no end; an open end is not itself among them."""

    low: str = ""
    low_open: bool = False
    high: str | None = None
    high_open: bool = False

    def and_from(self, low: str, is_open: bool) -> IdRange:
        return replace(self, low=low, low_open=is_open) if (low, is_open) > (self.low, self.low_open) else self

    def and_to(self, high: str, is_open: bool) -> IdRange:
        if self.high is None or (high, not is_open) < (self.high, not self.high_open):
            return replace(self, high=high, high_open=is_open)
        return self


@dataclass(frozen=True, slots=True)
class Filter:
    """None: whatever it is. `tenant`: "" for adapters without one."""

    family: str | None = None
    base_fingerprint: str | None = None
    tenant: str | None = None
    state: AdapterState | None = None
    pinned: bool | None = None
    labels: tuple[tuple[str, str], ...] = ()
    ids: IdRange = IdRange()


def parse_filter(text: str) -> Filter:
    """Raises `InvalidRequest` (field "filter"), which says at which character, counted from 1."""
    if len(text) > _LONGEST:
        raise InvalidRequest(f"filter has {len(text)} characters, more than the {_LONGEST} allowed", field="filter")
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._before = 0
        """Where what was taken last began."""
        self._values: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._ids = IdRange()

    def parse(self) -> Filter:
        self._skip_spaces()
        count = 0
        while self._at < len(self._text):
            if count:
                self._take(_AND, "AND or the end")
            if count == _MOST_COMPARISONS:
                self._fail(f"at most {_MOST_COMPARISONS} comparisons")
            self._comparison()
            count += 1
        return self._found()

    def _found(self) -> Filter:
        pinned = self._values.get("pinned")
        return Filter(
            family=self._values.get("family"),
            base_fingerprint=self._values.get("base_fingerprint"),
            tenant=self._values.get("tenant"),
            state=_STATES.get(self._values.get("state", "")),
            pinned=None if pinned is None else pinned == "true",
            labels=tuple(self._labels.items()),
            ids=self._ids,
        )

    def _comparison(self) -> None:
        start = self._at
        field = self._take(_FIELD, _FIELDS)
        if field == "id":
            self._id()
        elif field == "labels":
            self._once(self._labels, self._label(), start)
        elif field in ("family", "tenant", "state", "pinned", "base_fingerprint"):
            self._once(self._values, field, start)
        else:
            self._fail(_FIELDS, start)

    def _label(self) -> str:
        self._take(_DOT, '".<key>" after labels')
        if self._text.startswith('"', self._at):
            return self._string("a key")
        return self._take(_KEY, "a key of letters, digits, _ and -, or one in quotes")

    def _once(self, known: dict[str, str], name: str, start: int) -> None:
        if name in known:
            self._fail(f"{shown(name)!r} no second time", start)
        if self._take(_OPERATOR, '"="') != "=":
            self._fail(f'"=", the only comparison for {shown(name)!r}', self._before)
        if known is self._values and name == "pinned":
            known[name] = self._take(_BOOLEAN, "true or false")
            return
        known[name] = self._string("a value in quotes")
        if known is self._values and name == "state" and known[name] not in _STATES:
            self._fail('"ready" or "quarantined"', self._before)

    def _id(self) -> None:
        operator = self._take(_OPERATOR, "one of = < <= > >= :")
        value = self._string("a value in quotes")
        if operator == ":":
            if not value.endswith("*") or "*" in value[:-1]:
                self._fail('one "*", at the end of the text', self._before)
            self._ids = self._ids.and_from(value[:-1], False).and_to(value[:-1] + _AFTER_ALL_IDS, True)
        if operator in ("=", ">", ">="):
            self._ids = self._ids.and_from(value, operator == ">")
        if operator in ("=", "<", "<="):
            self._ids = self._ids.and_to(value, operator == "<")

    def _string(self, expected: str) -> str:
        text = re.sub(r"\\(.)", r"\1", self._take(_TEXT, expected)[1:-1])
        if not text.isprintable():
            self._fail("printable characters", self._before)
        return text

    def _take(self, pattern: re.Pattern[str], expected: str) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            self._fail(expected)
        self._before, self._at = self._at, match.end()
        self._skip_spaces()
        return match[0]

    def _skip_spaces(self) -> None:
        while self._text.startswith(" ", self._at):
            self._at += 1

    def _fail(self, expected: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        found = repr(shown(self._text[at : at + 20])) if at < len(self._text) else "the end"
        message = f"filter: expected {expected} at character {at + 1}, not {found}"
        raise InvalidRequest(message, field="filter", metadata={"position": str(at + 1)})
