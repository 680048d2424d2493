"""Ways of tuning: each a frozen budget that is attached to a model. Knows no data, no optimiser and no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeAlias

from overtone.errors import InvalidRequest
from overtone.tuning.methods.dcft import DcftMethod
from overtone.tuning.methods.loca import LocaMethod
from overtone.tuning.methods.peft_methods import FourierftMethod, LoraMethod
from overtone.tuning.methods.pica import PicaMethod
from overtone.tuning.methods.sdctft import SdctftMethod
from overtone.tuning.methods.selection import LowRank
from overtone.tuning.methods.types import Group, Method, Tuned

AnyMethod: TypeAlias = LocaMethod | SdctftMethod | DcftMethod | PicaMethod | LoraMethod | FourierftMethod

METHODS: Mapping[str, type[AnyMethod]] = {
    "loca": LocaMethod,
    "sdctft": SdctftMethod,
    "dcft": DcftMethod,
    "pica": PicaMethod,
    "lora": LoraMethod,
    "fourierft": FourierftMethod,
}

__all__ = [
    "METHODS",
    "DcftMethod",
    "FourierftMethod",
    "Group",
    "LocaMethod",
    "LoraMethod",
    "LowRank",
    "Method",
    "PicaMethod",
    "SdctftMethod",
    "Tuned",
    "make_method",
]


def make_method(name: str, **options: object) -> AnyMethod:
    """The method with this name. options: its fields; the others have their defaults.

    Raises `InvalidRequest` with the field for a name, an option or a value that there is not.
    """
    if name not in METHODS:
        raise InvalidRequest(f"there is no method {name!r}, only {', '.join(METHODS)}", field="method")
    known = [field.name for field in fields(METHODS[name])]
    stray = next((option for option in options if option not in known), None)
    if stray is not None:
        raise InvalidRequest(f"{name} has no option {stray}, only {', '.join(known)}", field=stray)
    return METHODS[name](**options)  # type: ignore[arg-type]
