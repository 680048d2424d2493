"""Untrusted text: how it is read as JSON and how it is shown in messages."""

from __future__ import annotations

import json
from typing import NoReturn

from overtone.errors import InvalidAdapter

_LONGEST_SHOWN = 160


def shown(value: object) -> str:
    """`value` for a message: printable and short, whatever a file or a client put in it."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= _LONGEST_SHOWN and text.isprintable():
        return text
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: _LONGEST_SHOWN + 1])
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def read_json_object(raw: bytes, what: str) -> dict[str, object]:
    """One JSON object, strictly: UTF-8, no key twice at any depth, finite numbers, no lone surrogates.

    Raises `InvalidAdapter`, whose message begins with `what`.
    """

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)!r} appears twice")
            found[key] = value
        return found

    def no_constant(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not a JSON number")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=without_duplicates, parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeError as error:
        raise InvalidAdapter(f"{what} is not valid UTF-8 text", field=what) from error
    except RecursionError as error:
        raise InvalidAdapter(f"{what} is nested too deeply", field=what) from error
    except ValueError as error:
        raise InvalidAdapter(f"{what} is not valid JSON: {shown(str(error))}", field=what) from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{what} must hold a JSON object, not {type(value).__name__}", field=what)
    return value
