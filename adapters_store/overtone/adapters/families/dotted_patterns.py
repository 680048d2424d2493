"""The older rule of PEFT 0.21.2 for patterns, which FourierFT and C3A still follow instead of that in `patterns`.

The first expression that matches the end of a module's name after a dot counts; if none does, the entry that is the whole
name, letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from overtone.adapters.families.patterns import Patterns
from overtone.adapters.text import shown
from overtone.errors import UnsupportedAdapter

T = TypeVar("T")


def dotted_patterns(patterns: Mapping[str, T], field: str) -> Callable[[str], T | None]:
    """Module -> the value that PEFT finds for it, None if it finds none.

    Raises `UnsupportedAdapter` at once for an expression with alternatives or anchors that PEFT would bind in a way that
    nobody can have meant; and what `Patterns` raises.
    """
    odd = next((key for key in patterns if "^" in key or _has_bare_alternatives(key)), None)
    if odd is not None:
        message = f"{field} has the expression {shown(odd)}; put alternatives into parentheses, and no ^ anywhere"
        raise UnsupportedAdapter(message, field=field)

    matching = Patterns(patterns, field)

    def find(module: str) -> T | None:
        # To match after any dot is to match all of what follows the first one, or the end of that after a dot.
        _, dot, rest = module.partition(".")
        found = matching.get(rest) if dot else None
        return patterns.get(module) if found is None else found

    return find


def _has_bare_alternatives(key: str) -> bool:
    if "|" not in key:
        return False
    depth = 0
    for character in key:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            return True
    return False
