"""One structured line for every call that changes the store: who, what, how it ended, how long it took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from overtone.adapters.store import AdapterRecord
from overtone.api.access_log import line_at_the_end
from overtone.api.status import Context

log = logging.getLogger("overtone.changes")


@dataclass(slots=True)
class Change:
    """What is known of a change when its line is written."""

    fields: dict[str, Any] = field(default_factory=dict)

    def stored(self, record: AdapterRecord) -> None:
        self.fields |= {"digest": record.digest, "etag": record.etag, "bytes": record.size_bytes}


class ChangeLog:
    """Writes to the logger "overtone.changes" at INFO; the line's fields are in the record's `fields`."""

    @contextmanager
    def change(self, method: str, context: Context | None, adapter: str = "") -> Iterator[Change]:
        """context: None if no client asked for it. Callers add fields: digest, bytes, counts of outcomes."""
        # The client's own string is cut: it is validated only later.
        change = Change({"adapter": adapter[:256]} if adapter else {})
        with line_at_the_end(log, "change", {"method": method, **_who(context)}, change.fields):
            yield change


def _who(context: Context | None) -> dict[str, str]:
    """The address, and under mutual TLS the name in the client's certificate."""
    if context is None:
        return {"peer": "server"}
    name = next(iter((context.auth_context() or {}).get("x509_common_name", ())), b"")
    return {"peer": context.peer(), **({"client": name.decode(errors="replace")} if name else {})}
