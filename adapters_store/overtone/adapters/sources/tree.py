"""The adapters in a folder and all folders below it, in whatever order the file system has them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.files import MAX_CONFIG_BYTES, AdapterFiles
from overtone.adapters.folder import FOLDER, open_or_refuse, read_file
from overtone.adapters.sources.entry import NAMES, Entry, layout_among, mark_of, refusal
from overtone.errors import PathRefused

_MAX_DEPTH = 32


def walk(root: Path, max_bytes: int) -> Generator[Entry, None, None]:
    """Holds one open listing for each level, however many folders there are. Hidden folders and links are left out."""
    return _walk(root, "", _MAX_DEPTH, max_bytes)


def _walk(path: Path, name: str, depth: int, max_bytes: int) -> Generator[Entry, None, None]:
    """name: of this folder; depth: of the levels that may follow."""
    files: dict[str, tuple[int, int]] = {}
    with operation("list a folder"):
        listing = os.scandir(path)
    with closing(listing):
        while (found := _next(listing)) is not None:
            inner = f"{name}/{found.name}".lstrip("/")
            if found.name in NAMES:
                with operation("list a folder"):
                    facts = found.stat(follow_symlinks=False)
                files[found.name] = facts.st_size, facts.st_mtime_ns
            elif found.name.startswith(".") or not found.is_dir(follow_symlinks=False):
                continue
            elif depth == 0:
                yield refusal(inner, PathRefused(f"folders are nested more than {_MAX_DEPTH} deep", field="path"))
            else:
                yield from _walk(path / found.name, inner, depth - 1, max_bytes)
    if files:
        yield Entry(name, mark_of(name, files), partial(read_folder, path, max_bytes))


def _next(listing: Iterator[os.DirEntry[str]]) -> os.DirEntry[str] | None:
    with operation("list a folder"):
        return next(listing, None)


def read_folder(path: Path, max_bytes: int) -> AdapterFiles:
    """The adapter in one folder. Raises `InvalidAdapter`, `PathRefused` for links, `TooLarge`, `StoreFailed`."""
    message = f"{path.name} is a link, not a folder, or cannot be opened"
    with operation("open a folder"):
        folder = open_or_refuse(path, FOLDER | os.O_NOFOLLOW, message)
    try:
        return _read(folder, max_bytes)
    finally:
        os.close(folder)


def _read(folder: int, max_bytes: int) -> AdapterFiles:
    with operation("list a folder"):
        layout = layout_among(os.listdir(folder))
    config = read_file(folder, layout.config, min(MAX_CONFIG_BYTES, max_bytes))
    return AdapterFiles(config, read_file(folder, layout.weights, max_bytes - len(config)), layout)
