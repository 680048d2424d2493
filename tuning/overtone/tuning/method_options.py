"""A method from the command line's words for budgets. Knows the methods' fields only by looking at them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from overtone.errors import InvalidRequest
from overtone.tuning.methods import make_method
from overtone.tuning.methods.types import Method

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "coefficients": ("n",),
    "rank": ("rank", "r"),
    "kernel_size": ("d",),
    "scale": ("scale", "scaling"),
    "alpha": ("alpha",),
    "dropout": ("dropout",),
    "target": ("targets",),
}
"""What an option is called among the fields of the methods that have it."""


def method_from(name: str, budgets: Mapping[str, Any], extra: Sequence[str]) -> Method:
    """budgets: values of options by their name, those not given None or empty; extra: KEY=VALUE for the method's other
    fields, values as JSON or plain text. Raises `InvalidRequest` for an option that the method does not have."""
    known = [each.name for each in fields(make_method(name))]
    chosen: dict[str, Any] = {}
    for option, value in budgets.items():
        if value is None or value == ():
            continue
        found = next((field for field in _FIELDS[option] if field in known), None)
        if found is None:
            raise _unknown(name, option, [each for each in _FIELDS if set(_FIELDS[each]) & set(known)])
        chosen[found] = value
    for pair in extra:
        key, equals, text = pair.partition("=")
        if not equals:
            raise InvalidRequest(f"set takes KEY=VALUE, not {pair!r}", field="set")
        if key not in known:
            raise _unknown(name, key, known)
        chosen[key] = _value(text)
    return make_method(name, **chosen)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _unknown(method: str, option: str, known: Sequence[str]) -> InvalidRequest:
    near = difflib.get_close_matches(option, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}"
    return InvalidRequest(f"{method} has no {option}{hint}", field=option)
