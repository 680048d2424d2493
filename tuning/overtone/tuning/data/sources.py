"""Where lines come from: files, read line by line, or an iterable. Knows nothing of what is on them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from overtone.errors import InvalidRequest
from overtone.tuning.data.types import Place, RawLine

MAX_LINE_BYTES = 64 << 20
"""A longer line is passed over in pieces, never held: one file without newlines must not fill the memory."""

_FINGERPRINTED = 1 << 20


class Source(Protocol):
    """Lines in a fixed order. rewindable: whether they can be read a second time."""

    @property
    def rewindable(self) -> bool: ...

    def lines(self) -> Iterator[RawLine]:
        """Every line that is not blank, from the beginning."""

    def identity(self) -> object:
        """What must be the same for a run to be resumed on it, for JSON."""


class FileSource:
    """One or several JSONL files after one another. Raises `InvalidRequest` if one is missing or empty."""

    def __init__(self, paths: Sequence[Path], field: str) -> None:
        self.paths = tuple(paths)
        self._field = field
        if not self.paths:
            raise InvalidRequest(f"{field} must name at least one file", field=field)
        for path in self.paths:
            if not path.exists() or path.is_dir():
                raise InvalidRequest(f"{field}: no such file: {path}", field=field)
            if path.is_file() and path.stat().st_size == 0:
                raise InvalidRequest(f"{field}: {path} is empty", field=field)

    @property
    def rewindable(self) -> bool:
        return all(path.is_file() for path in self.paths)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def lines(self) -> Iterator[RawLine]:
        for number, path in enumerate(self.paths):
            with _opened(path, self._field) as file:
                yield from _lines_of(file, number, str(path))

    def read(self, places: Iterable[tuple[int, int, int]]) -> Iterator[RawLine]:
        """The lines at (file, offset, line number), in that order."""
        files: dict[int, IO[bytes]] = {}
        try:
            for number, offset, line in places:
                path = self.paths[number]
                file = files.get(number) or files.setdefault(number, _opened(path, self._field))
                file.seek(offset)
                yield RawLine(Place(str(path), line), file.readline(MAX_LINE_BYTES).strip(), number, offset)
        finally:
            for file in files.values():
                file.close()

    def identity(self) -> object:
        return [_fingerprint(path, self._field) if path.is_file() else str(path) for path in self.paths]


class IterableSource:
    """Mappings, or lines as text or bytes, from an iterable. One that is its own iterator can be read once."""

    def __init__(self, items: Iterable[Any], field: str) -> None:
        self._items = items
        self._field = field

    @property
    def rewindable(self) -> bool:
        return iter(self._items) is not self._items

    def lines(self) -> Iterator[RawLine]:
        for number, item in enumerate(self._items):
            if not isinstance(item, str | bytes | Mapping):
                raise InvalidRequest(
                    f"{self._field}: item {number + 1} must be a mapping or a line, not {type(item).__name__}",
                    field=self._field,
                )
            data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            yield RawLine(Place(self._field, number + 1), data)

    def identity(self) -> object:
        return "iterable"


def source_of(data: Any, field: str) -> Source:
    """A path, several paths, or an iterable of samples."""
    if isinstance(data, str | Path):
        return FileSource([Path(data)], field)
    if isinstance(data, tuple | list) and data and all(isinstance(item, str | Path) for item in data):
        return FileSource([Path(item) for item in data], field)
    if isinstance(data, Iterable) and not isinstance(data, bytes | Mapping):
        return IterableSource(data, field)
    raise InvalidRequest(f"{field} must be a file, files or an iterable of samples", field=field)


def held_out(fraction: float, seed: int) -> Callable[[RawLine], bool]:
    """Whether a line belongs to the evaluation set: by its own bytes, so that equal lines are on one side."""
    key = seed.to_bytes(8, "little", signed=True)
    limit = int(fraction * 2**64)

    def is_held_out(raw: RawLine) -> bool:
        if fraction == 0 or raw.data is None:
            return False
        data = raw.data if isinstance(raw.data, bytes) else _canonical(raw.data)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little") < limit

    return is_held_out


def _canonical(item: Mapping[str, Any]) -> bytes:
    return json.dumps(item, sort_keys=True, default=str).encode("utf-8", "surrogatepass")


def _opened(path: Path, field: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"{field}: cannot read {path}: {error.strerror}", field=field) from error


def _lines_of(file: IO[bytes], number: int, name: str) -> Iterator[RawLine]:
    offset = 0
    for line in itertools.count(1):
        data = file.readline(MAX_LINE_BYTES)
        if not data:
            return
        length = len(data)
        rest = data
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            length += len(rest)
        if length > len(data):
            yield RawLine(Place(name, line), None, number, offset)
        elif stripped := data.strip():
            yield RawLine(Place(name, line), stripped, number, offset)
        offset += length


def _fingerprint(path: Path, field: str) -> list[object]:
    """Size and a digest of both ends: what a changed file changes, without reading all of a large one."""
    size = path.stat().st_size
    with _opened(path, field) as file:
        digest = hashlib.sha256(file.read(_FINGERPRINTED))
        file.seek(max(0, size - _FINGERPRINTED))
        digest.update(file.read(_FINGERPRINTED))
    return [str(path), size, digest.hexdigest()[:16]]
