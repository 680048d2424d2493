"""Files that come one after another, put together by their folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from overtone.adapters.sources.entry import NAMES, PICKLES, is_complete
from overtone.adapters.text import shown
from overtone.errors import PathRefused

T = TypeVar("T")

_MAX_WAITING = 64
_REMEMBERED = 256


@dataclass(frozen=True)
class Part(Generic[T]):
    """A file of an adapter."""

    size: int
    time: int
    content: T


def split(path: str) -> tuple[str, str] | None:
    """(folder, file name) of an adapter's file, None for any other path. Raises `PathRefused` for one that leads out."""
    folder, _, name = path.rpartition("/")
    if name not in NAMES:
        return None
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise PathRefused(f"the path {shown(path)!r} leads out of its archive or cannot be printed", field="path")
    return "/".join(parts), name


class Gather(Generic[T]):
    """Folders wait until they are complete; those that wait too long, or with too many bytes, are given up."""

    def __init__(self, max_nbytes: int = 64 << 20) -> None:
        """max_nbytes: of the files that wait."""
        self._waiting: OrderedDict[str, dict[str, Part[T]]] = OrderedDict()
        self._done: OrderedDict[str, bool] = OrderedDict()
        self._nbytes, self._max_nbytes = 0, max_nbytes

    def add(self, folder: str, name: str, part: Part[T]) -> Iterator[tuple[str, dict[str, Part[T]]]]:
        """The folders that are complete now or given up, with their files."""
        complete = self._done.get(folder)
        if complete is False or (complete and name in PICKLES):
            return  # it was given up, or has weights that are none
        files = self._waiting.setdefault(folder, {})
        self._nbytes += part.size
        files[name] = part
        if is_complete(files):
            yield self._take(folder)
        while len(self._waiting) > _MAX_WAITING or (self._nbytes > self._max_nbytes and len(self._waiting) > 1):
            yield self._take(next(iter(self._waiting)))

    def rest(self) -> Iterator[tuple[str, dict[str, Part[T]]]]:
        """Those that never became complete."""
        while self._waiting:
            yield self._take(next(iter(self._waiting)))

    def _take(self, folder: str) -> tuple[str, dict[str, Part[T]]]:
        files = self._waiting.pop(folder)
        self._nbytes -= sum(part.size for part in files.values())
        self._done[folder] = is_complete(files)
        while len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        return folder, files
