"""The order of the lines in each pass: a permutation of all by their offsets, or a shuffling buffer over the stream.

Both depend on the seed and the pass alone, so that a place in them is two numbers, the pass and the lines drawn from it.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Iterator
from typing import Protocol

from overtone.tuning.data.sources import FileSource, Source
from overtone.tuning.data.types import RawLine


class Order(Protocol):
    def epoch(self, number: int, start: int) -> Iterator[RawLine]:
        """The lines of pass `number`, from 0, without the first `start`."""


class Index:
    """Where lines are, 24 bytes each."""

    def __init__(self) -> None:
        self._entries = array("Q")

    def add(self, raw: RawLine) -> None:
        self._entries.extend((raw.file, raw.offset, raw.place.line))

    def __len__(self) -> int:
        return len(self._entries) // 3

    def __getitem__(self, item: int) -> tuple[int, int, int]:
        file, offset, line = self._entries[3 * item : 3 * item + 3]
        return file, offset, line


class Permuted:
    """All lines of `index`, in another order in each pass."""

    def __init__(self, source: FileSource, index: Index, seed: int) -> None:
        self._source = source
        self._index = index
        self._seed = seed

    def epoch(self, number: int, start: int) -> Iterator[RawLine]:
        order = array("Q", range(len(self._index)))
        random.Random(f"{self._seed}:{number}").shuffle(order)
        return self._source.read(self._index[item] for item in order[start:])


class Buffered:
    """Each line changes places with a random one of the `size` last read; size 1: as they come."""

    def __init__(self, source: Source, size: int, seed: int, left_out: Callable[[RawLine], bool]) -> None:
        self._source = source
        self._size = size
        self._seed = seed
        self._left_out = left_out

    def epoch(self, number: int, start: int) -> Iterator[RawLine]:
        """Going on at `start` reads the stream again up to there, without looking into its lines."""
        return itertools.islice(self._shuffled(random.Random(f"{self._seed}:{number}")), start, None)

    def _shuffled(self, generator: random.Random) -> Iterator[RawLine]:
        held: list[RawLine] = []
        for raw in self._source.lines():
            if self._left_out(raw):
                continue
            if len(held) < self._size:
                held.append(raw)
                continue
            place = generator.randrange(self._size)
            given, held[place] = held[place], raw
            yield given
        if self._size > 1:
            generator.shuffle(held)
        yield from held
