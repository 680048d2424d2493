"""What the operating system and SQLite refuse becomes `StoreFailed`; their texts name no path of the machine."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from overtone.errors import StoreFailed


@contextmanager
def operation(what: str) -> Iterator[None]:
    """Raises `StoreFailed` ("cannot <what>: <why>") for an `OSError` or `sqlite3.Error` inside."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreFailed(f"cannot {what}: {why or type(error).__name__}", metadata={"operation": what}) from error
