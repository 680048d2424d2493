"""Reading an adapter from a folder on this machine, below the directories that the operator allowed.

Every step is taken from the folder before it by handle and without following links, so there is no moment between a
check and a use in which somebody could swap a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.files import DOCUMENTATION, MAX_CONFIG_BYTES, AdapterFiles, layout_of
from overtone.adapters.text import shown
from overtone.errors import PathRefused, TooLarge

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LASTING = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENAMETOOLONG)
)


def read_folder(roots: Sequence[Path], path: str, max_bytes: int) -> AdapterFiles:
    """The files of the folder `path` below the first of `roots` that has it.

    Raises `PathRefused` for anything that is not plainly inside, `InvalidAdapter` for a folder with other or missing
    files, `TooLarge` before reading more than `max_bytes`.
    """
    parts = _parts(path)
    if not roots:
        raise PathRefused("no directory is allowed; start the server with --adapter-root", field="path")
    for root in roots:
        folder = _open_below(root, parts, path)
        if folder is not None:
            try:
                return _read_files(folder, max_bytes)
            finally:
                os.close(folder)
    raise PathRefused(f"no allowed directory has a folder {shown(path)!r}", field="path")


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    problem = None
    if not path:
        problem = "it is empty"
    elif path.startswith("/"):
        problem = "it must be relative to an allowed directory"
    elif "\0" in path or "\\" in path:
        problem = "it has a NUL or a backslash"
    elif any(part in ("", ".", "..") for part in parts):
        problem = "it has an empty, '.' or '..' component"
    elif not path.isprintable():
        problem = "it has characters that cannot be printed"
    if problem is not None:
        raise PathRefused(f"the path {shown(path)!r} is refused: {problem}", field="path")
    return parts


def _open_below(root: Path, parts: Sequence[str], path: str) -> int | None:
    """A handle of the folder, None if it is not there. The root itself is the operator's word and may be a link."""
    with operation("open an adapter root"):
        handle = os.open(root, FOLDER)
    for part in parts:
        why = f"the path {shown(path)!r} is refused: {shown(part)!r} is a link, not a folder, or cannot be opened"
        try:
            with operation("open an adapter folder"):
                inner = open_or_refuse(part, FOLDER | os.O_NOFOLLOW, why, handle)
        except PathRefused as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        finally:
            os.close(handle)
        handle = inner
    return handle


def _read_files(folder: int, max_bytes: int) -> AdapterFiles:
    with operation("list an adapter folder"):
        names = sorted(set(os.listdir(folder)) - DOCUMENTATION)
    layout = layout_of(names)
    config = read_file(folder, layout.config, min(MAX_CONFIG_BYTES, max_bytes))
    return AdapterFiles(config, read_file(folder, layout.weights, max_bytes - len(config)), layout)


def open_or_refuse(path: str | Path, flags: int, message: str, folder: int | None = None) -> int:
    """Raises `PathRefused` for what the path is, and `OSError` for what may pass, as too many open files."""
    try:
        return os.open(path, flags, dir_fd=folder)
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise PathRefused(message, field="path") from error


def read_file(folder: int, name: str, max_bytes: int) -> bytes:
    with operation("read an adapter folder"):
        handle = open_or_refuse(name, _FILE, f"{name} is a link, not a file, or cannot be opened", folder)
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise PathRefused(f"{name} is not a regular file", field="path")
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(min(facts.st_size, max_bytes) + 1)
        finally:
            os.close(handle)
    if len(data) > max_bytes:
        raise TooLarge(f"{name} is larger than the {max_bytes} bytes allowed", field=name)
    return data
