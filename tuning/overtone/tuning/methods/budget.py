"""What the budgets of all methods share: which layers, and how their numbers are checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from overtone.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Budget:
    """targets: the layers to adapt, by their full names or by what these end in after a dot (q_proj, self_attn.q_proj)."""

    name: ClassVar[str]
    targets: Sequence[str] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        targets = self.targets
        if isinstance(targets, str) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise InvalidRequest(f"targets must be a list of layer names, not {targets!r}", field="targets")
        if len(set(targets)) != len(targets):
            raise InvalidRequest(f"targets names a layer twice: {', '.join(targets)}", field="targets")

    def settings(self) -> dict[str, object]:
        """What a checkpoint remembers of it: every field that takes part in comparisons."""
        return {"method": self.name} | {f.name: getattr(self, f.name) for f in fields(self) if f.compare}


def check_count(value: object, field: str, *, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise InvalidRequest(f"{field} must be a whole number >= {least}, not {value!r}", field=field)


def check_number(value: object, field: str, *, positive: bool = False) -> None:
    """Finite; with `positive` above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{field} must be a finite number, not {value!r}", field=field)
    if positive and value <= 0:
        raise InvalidRequest(f"{field} must be above 0, not {value!r}", field=field)


def check_nonzero(value: object, field: str) -> None:
    check_number(value, field)
    if value == 0:
        raise InvalidRequest(f"{field} must not be 0: nothing would be learned", field=field)


def check_fraction(value: object, field: str) -> None:
    check_number(value, field)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise InvalidRequest(f"{field} must be from 0 to 1, not {value!r}", field=field)


def check_dropout(value: object) -> None:
    """A probability below 1, at which nothing would be left."""
    check_fraction(value, "dropout")
    if value == 1:
        raise InvalidRequest("dropout must be below 1", field="dropout")


def check_choice(value: object, field: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{field} must be one of {', '.join(choices)}, not {value!r}", field=field)


def check_flag(value: object, field: str) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be true or false, not {value!r}", field=field)
