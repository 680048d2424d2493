"""KEY=VALUE on the command line."""

from __future__ import annotations

from collections.abc import Iterable

import click


def pairs(labels: Iterable[str]) -> dict[str, str]:
    return dict(map(_pair, labels))


def _pair(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not (key and equals):
        raise click.BadParameter(f"{label!r} is not KEY=VALUE", param_hint="--label")
    return key, value
