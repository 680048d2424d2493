"""PEFT's patterns: configuration keys that give some modules another rank, alpha or size than the rest.

PEFT takes such a key as a regular expression that must match the end of a module's name after a dot, or all of it. Keys come
from strangers: most are plain names and are compared as such; of expressions only a few are run, and only those that cannot
take long, in which no group is repeated and few quantifiers follow each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from overtone.adapters.families.config import Rule
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, UnsupportedAdapter

T = TypeVar("T")

_LONGEST = 256
_MAX_KEYS = 2000
_MAX_EXPRESSIONS = 32
_MAX_QUANTIFIERS = 3
_PLAIN = re.compile(r"[\w\-.]+")
_ALLOWED = re.compile(r"(?:[\w\-]|\\[.\-dw]|\.|\^|\$|[*+?]|[()|]|\[[\w\-]+\])*")
_QUANTIFIED_GROUP = re.compile(r"\)[*+?]|\(\?")


def is_pattern_map(value: object) -> bool:
    """Pattern -> whole number >= 1."""
    if value is None:
        return True
    return isinstance(value, dict) and all(type(v) is int and v >= 1 for v in value.values())


COUNT_PATTERN = Rule(is_pattern_map, "a map of module names to whole numbers >= 1, or null")


class Patterns(Generic[T]):
    """The patterns of one configuration key, ready to be asked for every module of the adapter.

    Raises `UnsupportedAdapter` for an expression that we do not run, `InvalidAdapter` for one that is malformed.
    """

    def __init__(self, patterns: Mapping[str, T], field: str) -> None:
        if len(patterns) > _MAX_KEYS:
            raise InvalidAdapter(f"{field} has {len(patterns)} entries, more than {_MAX_KEYS}", field=field)
        self._entries = [
            (key, None if _PLAIN.fullmatch(key) else _compiled(key, field), patterns[key]) for key in patterns
        ]
        expressions = sum(expression is not None for _, expression, _ in self._entries)
        if expressions > _MAX_EXPRESSIONS:
            message = f"{field} has {expressions} expressions, more than the {_MAX_EXPRESSIONS} that are run"
            raise UnsupportedAdapter(message, field=field)

    def get(self, module: str) -> T | None:
        """The value of the first pattern that matches `module`, as PEFT does; None if none matches."""
        for key, expression, value in self._entries:
            if _ends_with(module, key) if expression is None else expression.match(module):
                return value
        return None


def _ends_with(module: str, key: str) -> bool:
    """Whether `key`, in which a dot stands for any character, is the end of `module` after a dot, or all of it."""
    start = len(module) - len(key)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return module.endswith(key) or all(k in (".", c) for k, c in zip(key, module[start:], strict=True))


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
