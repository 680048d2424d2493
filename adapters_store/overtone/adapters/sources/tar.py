"""Reading a tar archive from a stream, one member at a time, in bounded memory whatever its headers say.

ustar, and of the extensions by POSIX (pax) and GNU long names and large sizes. `tarfile` reads extension headers of any
declared size into memory and remembers all members; here neither grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from overtone.errors import InvalidRequest

_BLOCK = 512
_MAX_EXTENSION = 64 << 10
_SKIP = 1 << 20
_FILES = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"


class Readable(Protocol):
    """Fewer bytes than asked for only at the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """size: bytes; time: seconds; regular: a file, not a folder, a link or a device."""

    path: str
    size: int
    time: int
    regular: bool


class Tar:
    """Iterate, and call `content` for those members whose bytes matter before the next one. Raises `InvalidRequest`."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._left = 0
        """Bytes of the current member's data and padding that are not read yet."""

    def __iter__(self) -> Iterator[Member]:
        path, size = "", None
        started = False
        while (header := self._header(started)) is not None:
            started, kind = True, header[156:157]
            member = _member(header, path, size)
            self._left = _padded(member.size)
            if kind == _LONG_NAME:
                path = _text(self._extension(member))
            elif kind == _PAX:
                records = _records(self._extension(member))
                path = records.get("path", path)
                size = _decimal(records["size"]) if "size" in records else size
            elif kind in (_LONG_LINK, _PAX_GLOBAL):
                self._extension(member)
            elif kind == _SPARSE:
                raise _damaged("it has a sparse file")
            else:
                yield member
                path, size = "", None

    def content(self, member: Member) -> bytes:
        """All bytes of the member that was yielded last."""
        assert self._left == _padded(member.size)
        return self._exactly(member.size)

    def _header(self, started: bool) -> bytes | None:
        while self._left:
            self._exactly(min(self._left, _SKIP))
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _damaged("it ends too early" if started else "it is no tar archive")
        if not any(block):
            return None
        if not _is_header(block):
            raise _damaged("a header has a wrong checksum" if started else "it is no tar archive")
        return block

    def _extension(self, member: Member) -> bytes:
        if member.size > _MAX_EXTENSION:
            raise _damaged(f"an extension header has {member.size} bytes")
        return self._exactly(member.size)

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise _damaged("it ends too early")
        self._left -= size
        if size and self._left < _BLOCK and self._left:
            self._left -= len(self._file.read(self._left))
        return data


def _is_header(block: bytes) -> bool:
    """Whether its checksum is right, the field of which counts as spaces."""
    digits = block[148:156].strip(b" \0")
    right = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    return digits.isdigit() and not digits.strip(b"01234567") and int(digits, 8) == right


def _member(header: bytes, path: str, size: int | None) -> Member:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    own = "/".join(part for part in (prefix, _text(header[:100])) if part)
    kind = header[156:157]
    length = _number(header[124:136]) if size is None else size
    return Member(path or own, length, _number(header[136:148]), kind in _FILES and not own.endswith("/"))


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _number(field: bytes) -> int:
    """Octal digits, or binary where the first bit is set."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise _damaged("a header has no number where one belongs")
    return int(digits, 8) if digits else 0


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise _damaged("an extension header has no number where one belongs")
    return int(text)


def _records(data: bytes) -> dict[str, str]:
    """Of a pax header: "LENGTH KEY=VALUE\\n", the length that of all of it."""
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        size = _decimal(length.decode("ascii", "replace")) if space else 0
        key, equals, value = data[len(length) + 1 : size].partition(b"=")
        if size > len(data) or not equals or not value.endswith(b"\n"):
            raise _damaged("an extension header is malformed")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        data = data[size:]
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _damaged(what: str) -> InvalidRequest:
    return InvalidRequest(f"the archive is damaged: {what}", field="source")
