"""What guided decoding asks of a grammar: a row of bits for each guided sequence. Knows no grammar library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.int32]
"""Packed bits, 32 tokens a word, the lowest bit first; set: the token may come next."""


class GuideMatcher(Protocol):
    """Where one generation stands in its guide. Used by the engine's thread only."""

    def follow(self, output_ids: Sequence[int]) -> bool:
        """Takes in what `output_ids` has more than at the last call. False if the guide does not allow it."""


class Guide(Protocol):
    """A compiled grammar; shared by any number of generations. All guides of an engine are of one kind."""

    def matcher(self) -> GuideMatcher:
        """A new generation's place: the beginning."""

    def fill(self, matchers: Sequence[GuideMatcher], rows: Mask) -> list[bool]:
        """Writes into each of `rows` (G, words) which tokens may come next for one of `matchers`, of this guide or others,
        the end-of-sequence tokens exactly where the text may end. False for each that gave up, for instance on a
        limit."""


def words_for(vocabulary: int) -> int:
    return -(-vocabulary // 32)


def forbid(row: Mask, tokens: Sequence[int]) -> None:
    """Clears the bits of `tokens`, unless nothing would be left: then the row stays as it is."""
    changed = row.copy()
    for token in tokens:
        changed[token // 32] &= np.int32(~np.uint32(1 << token % 32).astype(np.int32))
    if changed.any():
        row[:] = changed


def unpack(mask: Mask, vocabulary: int) -> npt.NDArray[np.bool_]:
    """(G, words) packed bits -> (G, vocabulary)."""
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocabulary].astype(np.bool_)
