"""Where a blob lies, and how a record of a pack looks.

A record: magic (8 bytes), length of the blob (8, little-endian), its SHA-256 (32), the blob, zeros up to a multiple of 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<8sQ32s")
_MAGIC = b"OVTBLOB1"
HEADER_BYTES = _HEADER.size
OWN_FILE = 0
"""The number that stands for no pack: the blob is a file of its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """`length` bytes in the record that begins at byte `offset` of a pack; offset 0 where pack is `OWN_FILE`."""

    pack: int
    offset: int
    length: int

    @property
    def data(self) -> int:
        """Where the blob itself begins."""
        return self.offset + HEADER_BYTES

    @property
    def end(self) -> int:
        """Where the next record may begin: a pack reaches at least to here."""
        return self.offset + record_bytes(self.length)


def record_bytes(length: int) -> int:
    """What a blob of `length` bytes takes of a pack."""
    return HEADER_BYTES + length + -length % 8


def header_of(digest: str, length: int) -> bytes:
    return _HEADER.pack(_MAGIC, length, bytes.fromhex(digest))


def padding_of(length: int) -> bytes:
    return bytes(-length % 8)
