"""All that the packs do to files, and nothing else: the one place where a test makes the disk fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_BUFFERS = 1024
"""In one call: Linux's IOV_MAX."""


def create(path: Path) -> int:
    """A handle for reading and writing a file that did not exist."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def open_write(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def open_read(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def close(handle: int) -> None:
    os.close(handle)


def write_all(handle: int, buffers: Sequence[bytes], offset: int) -> None:
    """All of `buffers`, one after another, from byte `offset` on. Raises `OSError` with some of it written or none."""
    rest = [memoryview(buffer) for buffer in buffers if buffer]
    first = 0
    while first < len(rest):
        written = os.pwritev(handle, rest[first : first + _BUFFERS], offset)
        offset += written
        while first < len(rest) and written >= len(rest[first]):
            written -= len(rest[first])
            first += 1
        if written:
            rest[first] = rest[first][written:]


def pread(handle: int, length: int, offset: int) -> bytes:
    """`length` bytes from byte `offset` on, fewer only where the file ends."""
    blob = os.pread(handle, length, offset)
    while len(blob) < length and (more := os.pread(handle, length - len(blob), offset + len(blob))):
        blob += more
    return blob


def read_file(path: Path) -> bytes:
    return path.read_bytes()


def touch(path: Path) -> None:
    """Sets the time of modification to now."""
    os.utime(path)


def sync(handle: int) -> None:
    """The content and what is needed to read it again survive a power cut."""
    os.fdatasync(handle)


def sync_file(path: Path) -> None:
    """`sync` of a file that somebody else wrote."""
    handle = open_read(path)
    try:
        sync(handle)
    finally:
        close(handle)


def sync_folder(path: Path) -> None:
    """The names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def truncate(handle: int, size: int) -> None:
    os.ftruncate(handle, size)


def replace(source: Path, target: Path) -> None:
    source.replace(target)


def unlink(path: Path) -> None:
    """Whether or not it is there."""
    path.unlink(missing_ok=True)


def size(path: Path) -> int:
    return path.stat().st_size


def write_file(path: Path, content: bytes) -> None:
    """A new file, its content synced, its name not. Nothing is left of it if that fails."""
    handle = create(path)
    try:
        write_all(handle, [content], 0)
        sync(handle)
    except OSError:
        unlink(path)
        raise
    finally:
        close(handle)


def replace_file(path: Path, content: bytes, scratch: Path) -> None:
    """`path` holds what it held before or all of `content`, whatever happens, and on return the latter for good."""
    try:
        write_file(scratch, content)
        replace(scratch, path)
    except OSError:
        unlink(scratch)
        raise
    sync_folder(path.parent)
