"""What makes a tuning run's settings sound: each alone, then together. Raises InvalidRequest with the field's name."""

from __future__ import annotations

import math
from dataclasses import Field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from overtone.errors import InvalidRequest

if TYPE_CHECKING:
    from overtone.tuning.config import TuneConfig


def check_value(setting: Field[Any], hint: Any, value: Any) -> None:
    """One field alone: of its type, among its choices, inside its range."""
    name, least, most = setting.name, setting.metadata["least"], setting.metadata["most"]
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return
    if get_origin(hint) is Literal:
        if value not in kinds:
            raise InvalidRequest(f"{name} must be one of {', '.join(kinds)}, not {value!r}", field=name)
        return
    if not _is_a(kinds, value):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
        raise InvalidRequest(f"{name} must be {wanted}, not {value!r}", field=name)
    if isinstance(value, str) and not value:
        raise InvalidRequest(f"{name} must not be empty", field=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, not {value}", field=name)
    if least is not None and value < least:
        raise InvalidRequest(f"{name} must be at least {least}, not {value}", field=name)
    if most is not None and value > most:
        raise InvalidRequest(f"{name} must be at most {most}, not {value}", field=name)


def _is_a(kinds: tuple[Any, ...], value: Any) -> bool:
    """As the type says, but a whole number is a float too, and a truth value is no number."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def check_run(config: TuneConfig) -> None:
    if config.steps is not None and config.epochs is not None:
        raise InvalidRequest("either steps or epochs, not both", field="steps")
    for name in ("epochs", "lr"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InvalidRequest(f"{name} must be more than 0, not {value}", field=name)
    if config.warmup > 1 and config.warmup != int(config.warmup):
        raise InvalidRequest(f"warmup must be a share below 1 or a whole number, not {config.warmup}", field="warmup")
    if config.steps is not None and config.warmup >= 1 and config.warmup >= config.steps:
        raise InvalidRequest(
            f"warmup ({config.warmup:g}) must be less than steps ({config.steps}): the full rate would never be reached",
            field="warmup",
        )
    if config.out.exists():
        raise InvalidRequest(f"out: {config.out} exists already: give another folder or remove it", field="out")


def check_data(config: TuneConfig) -> None:
    if config.eval_data is not None and config.eval_fraction:
        raise InvalidRequest("either eval_data or eval_fraction, not both", field="eval_fraction")
    evaluates = config.eval_data is not None or config.eval_fraction > 0
    for name in ("patience", "eval_every"):
        if getattr(config, name) is not None and not evaluates:
            raise InvalidRequest(f"{name} needs an evaluation set: eval_data or eval_fraction", field=name)
    if common := _paths(config.data) & _paths(config.eval_data):
        raise InvalidRequest(f"eval_data: {min(common)} is learned from", field="eval_data")


def _paths(data: Any) -> set[Path]:
    named = data if isinstance(data, list | tuple) else [data]
    return {Path(each).resolve() for each in named if isinstance(each, str | Path)}
