"""Many adapters from one place: a folder of folders, a tar archive, or either behind a URL. Read lazily, never extracted.

An adapter is a folder with the two files of a layout; what else is in it is left alone, and links are never followed.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.sources.archive import open_archive
from overtone.adapters.sources.entry import NAMES, Entry, Source, mark_of
from overtone.adapters.sources.tree import read_folder, walk
from overtone.adapters.sources.urls import open_objects, open_url
from overtone.errors import InvalidRequest

__all__ = ["NAMES", "Entry", "Source", "mark_of", "open_source", "read_folder"]

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://")


def open_source(place: str, max_bytes: int) -> Source:
    """The adapters in a folder or in a tar archive (plain, or compressed by gzip, bzip2, xz or zstd) of this machine, at an
    http or https URL of such an archive, or at a URL of object storage: of an archive, or of a prefix, which ends in "/".

    max_bytes: of one adapter. Raises `InvalidRequest` if there is nothing like that, and `StoreFailed` if it cannot be read;
    so does the iteration, where an archive is damaged or the disk fails.
    """
    if url := _URL.match(place):
        return open_url(place, max_bytes) if url[1] in ("http", "https") else open_objects(place, max_bytes)
    path = Path(place)
    with operation(f"read {path.name}"):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            raise InvalidRequest("there is no such file or folder", field="source") from error
        if stat.S_ISDIR(mode):
            return Source(walk(path, max_bytes))
        if not stat.S_ISREG(mode):
            raise InvalidRequest("the source is neither a file nor a folder", field="source")
        file = path.open("rb")
        return open_archive(file, max_bytes, total=path.stat().st_size)
