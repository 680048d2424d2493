"""Tenants by name, and their weights as a setting has them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from overtone.errors import ConfigError

_NAME = re.compile(r"[a-z0-9\-_.]{0,64}")


def is_tenant(name: str) -> bool:
    """Whether it may be a tenant's name. The empty name is the tenant of requests that name none."""
    return _NAME.fullmatch(name) is not None


def tenant_weights(settings: Iterable[str]) -> dict[str, float]:
    """{name: weight} of "NAME=WEIGHT" texts. Raises `ConfigError`."""
    weights: dict[str, float] = {}
    for text in settings:
        name, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not is_tenant(name) or not 0 < weight < math.inf:
            raise ConfigError(
                f"tenant_weight must be NAME=WEIGHT with a name of a-z0-9-_. and a weight above 0, not {text!r}",
                field="tenant_weight",
            )
        if name in weights:
            raise ConfigError(f"tenant_weight names {name!r} twice", field="tenant_weight")
        weights[name] = weight
    return weights
