"""docs/quality.md: its tables are made from the rows, between marks; what is around them is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.quality.tables import compression_table, findings, rates_table, table
from bench.quality.workbench import Row

DOCUMENT = Path("docs/quality.md")
_PARTS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "scores": table,
    "findings": findings,
    "compression": compression_table,
    "rates": rates_table,
}


def documented(text: str, rows: Sequence[Row]) -> str:
    """`text` with each part made anew. Raises `ValueError` for a document without the marks of a part."""
    for name, make in _PARTS.items():
        start, end = f"<!-- {name}: made by bench.quality -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the document has no part {name!r}, between {start} and {end}")
        text = f"{before}{start}\n\n{make(rows)}\n\n{end}{after}"
    return text
