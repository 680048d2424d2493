"""What a source is made of, and how a folder's files make an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass

from overtone.adapters.files import FILE_NAMES, LAYOUTS, AdapterFiles, Layout, check_file_name, layout_of
from overtone.errors import OvertoneError

PICKLES = ("adapter_model.bin", "pica_adapter.bin")
"""What some tools write in place of the weights; mentioned in errors, never read."""
NAMES = frozenset({*FILE_NAMES, *PICKLES})
"""Files whose folder is an adapter."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter of a source. name: its folder, relative to the source, parts joined by "/"; "" for the source itself.
    mark: eight bytes that change when the name, a file's size or its time does. read: its files, until the next entry is
    asked for; raises why there are none."""

    name: str
    mark: bytes
    read: Callable[[], AdapterFiles]


@dataclass(frozen=True, slots=True)
class Source:
    """entries: to be iterated once; closed, they let go of what they read. position, total: bytes read so far and in all,
    where that is known."""

    entries: Generator[Entry, None, None]
    position: Callable[[], int] | None = None
    total: int | None = None


def layout_among(names: Collection[str]) -> Layout:
    """The layout of a folder with these files, those aside that belong to none. Raises `InvalidAdapter`."""
    ours = [name for name in names if name in FILE_NAMES]
    if not any(layout.weights in ours for layout in LAYOUTS):
        for name in names:
            if name in PICKLES:
                check_file_name(name)
    return layout_of(sorted(ours))


def is_complete(names: Collection[str]) -> bool:
    return any(layout.config in names and layout.weights in names for layout in LAYOUTS)


def mark_of(name: str, files: Mapping[str, tuple[int, int]]) -> bytes:
    """files: (size, time) by name."""
    facts = json.dumps([name, sorted(files.items())]).encode()
    return hashlib.blake2b(facts, digest_size=8).digest()


def refusal(name: str, error: OvertoneError) -> Entry:
    """An entry that only says why it is none."""

    def read() -> AdapterFiles:
        raise error

    return Entry(name, mark_of(name, {}), read)
