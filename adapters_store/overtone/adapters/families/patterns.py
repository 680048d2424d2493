"""PEFT's patterns: configuration keys that give some modules another rank, alpha or size than the rest.

PEFT takes such a key as a regular expression that must match the end of a module's name after a dot, or all of it. Keys come
from strangers, so only expressions are run that cannot take long: no group is repeated, and few quantifiers follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from overtone.adapters.families.config import Rule
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, UnsupportedAdapter

T = TypeVar("T")

_LONGEST = 256
_MAX_KEYS = 10_000
_MAX_QUANTIFIERS = 4
_ALLOWED = re.compile(r"(?:[\w\-]|\\[.\-dw]|\.|\^|\$|[*+?]|[()|]|\[[\w\-]+\])*")
_QUANTIFIED_GROUP = re.compile(r"\)[*+?]|\(\?")


def is_pattern_map(value: object) -> bool:
    """Pattern -> whole number >= 1."""
    if value is None:
        return True
    return isinstance(value, dict) and all(type(v) is int and v >= 1 for v in value.values())


COUNT_PATTERN = Rule(is_pattern_map, "a map of module names to whole numbers >= 1, or null")


def pattern_value(patterns: Mapping[str, T], module: str, field: str) -> T | None:
    """The value of the first pattern that matches `module`, as PEFT does; None if none matches.

    Raises `UnsupportedAdapter` for an expression that we do not run, `InvalidAdapter` for one that is malformed.
    """
    if len(patterns) > _MAX_KEYS:
        raise InvalidAdapter(f"{field} has {len(patterns)} entries, more than {_MAX_KEYS}", field=field)
    for key, value in patterns.items():
        if _compiled(key, field).match(module):
            return value
    return None


def _compiled(key: str, field: str) -> re.Pattern[str]:
    quantifiers = sum(key.count(q) for q in "*+?")
    if (
        len(key) > _LONGEST
        or quantifiers > _MAX_QUANTIFIERS
        or not _ALLOWED.fullmatch(key)
        or _QUANTIFIED_GROUP.search(key)
    ):
        message = f"{field} has the expression {shown(key)}, which is too complicated to be run safely"
        raise UnsupportedAdapter(message, field=field)
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except re.error as error:
        raise InvalidAdapter(f"{field} has the malformed expression {shown(key)}: {error}", field=field) from error
