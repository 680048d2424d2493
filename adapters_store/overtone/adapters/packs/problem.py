"""What a look at the files may find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Progress = Callable[[int, int], None]
"""Told (done, total) of whatever is counted."""

Kind = Literal[
    "missing_pack",
    "missing_remote",
    "missing_file",
    "out_of_range",
    "overlap",
    "bad_header",
    "bad_digest",
    "unreferenced_file",
    "unknown_pack",
    "stray_file",
]
_GARBAGE: tuple[Kind, ...] = ("unreferenced_file", "unknown_pack")


@dataclass(frozen=True, slots=True)
class Problem:
    """`digest`: "" where no single blob is meant; `pack`: 0 for own files; `what`: one sentence for the operator."""

    kind: Kind
    digest: str
    pack: int
    what: str

    @property
    def garbage(self) -> bool:
        """Nothing is lost and nothing refers to it: it may be removed."""
        return self.kind in _GARBAGE


def no_progress(done: int, total: int) -> None:
    pass
