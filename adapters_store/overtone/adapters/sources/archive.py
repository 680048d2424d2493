"""The adapters in a tar archive, compressed or not, read from its beginning to its end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Generator
from typing import IO

from overtone.adapters.failures import operation
from overtone.adapters.files import CONFIG_FILES, MAX_CONFIG_BYTES, AdapterFiles
from overtone.adapters.sources.entry import Entry, Source, layout_among, mark_of, refusal
from overtone.adapters.sources.gather import Gather, Part, split
from overtone.adapters.sources.tar import Member, Tar
from overtone.adapters.text import shown
from overtone.errors import InvalidRequest, OvertoneError, PathRefused, TooLarge

_MAX_RATIO = 250
_FREE_BYTES = 64 << 20
"""Uncompressed bytes before the ratio counts: a short archive may be anything."""
_BUFFER = 1 << 18


def open_archive(file: IO[bytes], max_bytes: int, total: int | None) -> Source:
    """Closes `file` at the end. total: its bytes, where known."""
    counted = _Counted(file)
    return Source(_entries(counted, max_bytes), lambda: counted.count, total)


class _Counted(io.RawIOBase):
    """A file that knows how much was read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)

    def close(self) -> None:
        super().close()
        self._file.close()


class _Bounded:
    """What comes out of a decompressor, until it is too much for what went in."""

    def __init__(self, file: IO[bytes], went_in: _Counted) -> None:
        self._file, self._in, self._out = file, went_in, 0

    def read(self, size: int, /) -> bytes:
        """As many bytes as asked for, fewer only at the end."""
        pieces = []
        while size > 0 and (data := self._file.read(size)):
            pieces.append(data)
            size -= len(data)
            self._out += len(data)
            if self._out > _FREE_BYTES and self._out > _MAX_RATIO * self._in.count:
                raise TooLarge(f"the archive expands more than {_MAX_RATIO} times: it is not read on", field="source")
        return b"".join(pieces)


def _entries(file: _Counted, max_bytes: int) -> Generator[Entry, None, None]:
    with file, operation("read an archive"):
        try:
            yield from _gathered(Tar(_Bounded(_decompressed(file), file)), max_bytes)
        except (zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file cannot be read; without a number it is a decompressor that says so
            raise InvalidRequest(f"the archive is damaged: {shown(str(error))}", field="source") from error


def _decompressed(file: _Counted) -> IO[bytes]:
    buffered = io.BufferedReader(file, _BUFFER)
    start = buffered.peek(6)[:6]
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        return bz2.BZ2File(buffered)
    if start == b"\xfd7zXZ\0":
        return lzma.LZMAFile(buffered)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd(buffered)
    return buffered


def _zstd(file: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        message = "reading zstd needs the package zstandard: install it, or compress the archive with gzip"
        raise InvalidRequest(message, field="source") from error
    opened: IO[bytes] = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file, read_across_frames=True)
    return opened


def _gathered(tar: Tar, max_bytes: int) -> Generator[Entry, None, None]:
    gather = Gather[bytes | OvertoneError]()
    for member in tar:
        try:
            found = split(member.path)
        except PathRefused as error:
            yield refusal(shown(member.path), error)
            continue
        if found is not None:
            folder, name = found
            content = _content(tar, member, name, max_bytes)
            size = len(content) if isinstance(content, bytes) else 0
            for group in gather.add(folder, name, Part(size, member.time, content)):
                yield _entry(*group)
    for group in gather.rest():
        yield _entry(*group)


def _content(tar: Tar, member: Member, name: str, max_bytes: int) -> bytes | OvertoneError:
    if not member.regular:
        return PathRefused(f"{name} is a link or no regular file", field="path")
    limit = min(MAX_CONFIG_BYTES, max_bytes) if name in CONFIG_FILES else max_bytes
    if member.size > limit:
        return TooLarge(f"{name} is larger than the {limit} bytes allowed", field=name)
    return tar.content(member)


def _entry(folder: str, files: dict[str, Part[bytes | OvertoneError]]) -> Entry:
    def read() -> AdapterFiles:
        layout = layout_among(files)
        return AdapterFiles(_sound(files[layout.config]), _sound(files[layout.weights]), layout)

    return Entry(folder, mark_of(folder, {name: (part.size, part.time) for name, part in files.items()}), read)


def _sound(part: Part[bytes | OvertoneError]) -> bytes:
    if isinstance(part.content, OvertoneError):
        raise part.content
    return part.content
