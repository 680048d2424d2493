"""What the commands print: tables for people, JSON for programs. Colour only on a terminal and without NO_COLOR."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PIPED_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """Prints text as it is: no markup, no highlighting. A pipe gets wide lines, so that nothing is cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def printable(text: str) -> str:
    """Without control characters: a model's text or a label must not drive the terminal."""
    return _CONTROL.sub("", text)


def grid(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """The last column takes the lines that do not fit; the others stay whole where they can."""
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else printable(cell) for cell in row))
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    console().print(grid(columns, rows))


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"


def as_json(value: Any) -> str:
    """A dataclass, or what json knows, in one line."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    return json.dumps(plain, default=_encode, ensure_ascii=False)


def print_json(value: Any) -> None:
    click.echo(as_json(value))


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON array, written while it is read."""
    separator = "["
    for value in values:
        click.echo(f"{separator}{as_json(value)}", nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def _encode(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
