"""The cores of adapters as the kernels read them: records of 32-bit words, many in an extent, one extent an adapter.

An extent is one run of words that holds everything of an adapter and no address, so it may lie anywhere and be moved as
it is. It begins with directories, one for each kind of record that the adapter has: one word a slot (a layer of the
model), where the slot's record begins, counted from the directory's own first word; 0: none. Records and directories
begin at multiples of `ALIGNMENT` words. Several slots may name one record.

    spectral   n, bits of float32 scale, 1 if n > 65535 else 0, 0 | values (n) | columns (n) 16 bits | ends, low
               16 bits | if n > 65535: ends, high 16 bits | places in their block (n) 8 bits
    pair       r, 0, 0, 0 | D (r, q) | U (r, p)        numbers of the arena
    expand     r, 0, 0, 0 | U (r, p)                   numbers of the arena

Each part is filled up to a word, the numbers of pairs to `ALIGNMENT` words. A spectral core's entries are sorted by row,
in the order of the transform's places; 16 consecutive places are a block, and `ends` says before which entry each block
begins, and the last one ends (blocks + 1 of them). That is smaller than 16-bit row pointers where a core has fewer than
15 entries for 8 rows, and than 16-bit coordinates where it has more than one for 8 rows, and a tile of 16 places is found
without a search. Entry i is values[i] * scale: float32 values have scale 1, 16-bit ones (float16, whatever the arena's
numbers) are at most 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels.gpu.plans import Plan

ALIGNMENT = 4
"""Words: 16 bytes."""
HEADER = 4
"""Words before a record's parts."""
NARROW = 1 << 16
"""Entries from which ends have more than 16 bits."""
Words = TypeVar("Words", int, NDArray[np.int64])


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """words: (n,) int32, on the host; directories: where the directory of each kind begins."""

    words: torch.Tensor
    directories: Mapping[str, int]


def extent_of(slots: int, kinds: Mapping[str, Mapping[int, torch.Tensor]]) -> Extent:
    """kinds: records by slot; a record that several slots name is one tensor, kept once."""
    head = aligned(slots)
    directories = [[0] * head for _ in kinds]
    records: list[torch.Tensor] = []
    begins: dict[int, int] = {}
    end = head * len(kinds)
    for at, by_slot in enumerate(kinds.values()):
        for slot, record in by_slot.items():
            if id(record) not in begins:
                assert record.numel() % ALIGNMENT == 0
                begins[id(record)] = end
                records.append(record)
                end += record.numel()
            directories[at][slot] = begins[id(record)] - at * head
    words = torch.cat([torch.tensor(directories, dtype=torch.int32).flatten(), *records])
    return Extent(words, {kind: at * head for at, kind in enumerate(kinds)})


def spectral_record(
    rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, inverse: Plan, dtype: torch.dtype
) -> torch.Tensor:
    """rows: (n,) indices of coefficients of `inverse`, of its transform's output; cols: (n,) places of the input's, below
    65536; values: (n,), with the transforms' weights; dtype: of the values, float32 or float16."""
    # numpy: a core's few numbers take torch longer to ask for than to compute, and an adapter has hundreds of cores.
    block, local = inverse.block_of(rows.numpy())
    order = np.argsort((block << 24) | (local << 16) | cols.numpy(), kind="stable")
    n, kind = len(order), np.float32 if dtype is torch.float32 else np.float16
    numbers = values.numpy()[order]
    scale = 1.0 if kind is np.float32 else max(float(np.abs(numbers).max(initial=0.0)), 1e-30)
    ends = np.zeros(inverse.blocks + 1, dtype=np.int64)
    np.cumsum(np.bincount(block, minlength=inverse.blocks), out=ends[1:])
    parts = [(numbers / scale).astype(kind), cols.numpy()[order].astype(np.uint16), ends.astype(np.uint16)]
    wide = n >= NARROW
    if wide:
        parts.append((ends >> 16).astype(np.uint16))
    header = np.array([n, 0, wide, 0], dtype=np.int32)
    header[1] = np.float32(scale).view(np.int32)
    return torch.from_numpy(_joined([header, *parts, local[order].astype(np.uint8)]))


def pair_record(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """down: (r, q); up: (r, p); dtype: of the arena's numbers."""
    assert len(down) == len(up)
    parts = [_filled(_words(part.to(dtype).flatten())) for part in (down, up)]
    return torch.cat([torch.tensor([len(up), 0, 0, 0], dtype=torch.int32), *parts])


def expand_record(up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """up: (r, p); dtype: of the arena's numbers."""
    return torch.cat([torch.tensor([len(up), 0, 0, 0], dtype=torch.int32), _filled(_words(up.to(dtype).flatten()))])


def aligned(words: Words) -> Words:
    return -(-words // ALIGNMENT) * ALIGNMENT


def _joined(parts: list[NDArray[Any]]) -> NDArray[np.int32]:
    """One after another, each from a word's beginning on, and filled up to `ALIGNMENT` words."""
    begins = np.cumsum([0, *(-(-part.nbytes // 4) for part in parts)])
    joined = np.zeros(aligned(int(begins[-1])), dtype=np.int32)
    octets = joined.view(np.uint8)
    for part, begin in zip(parts, begins[:-1], strict=True):
        octets[4 * begin : 4 * begin + part.nbytes] = part.view(np.uint8)
    return joined


def _words(part: torch.Tensor) -> torch.Tensor:
    """As int32, zeros after its end."""
    raw = part.contiguous().view(torch.uint8)
    grown = raw.new_zeros(-(-len(raw) // 4) * 4)
    grown[: len(raw)] = raw
    return grown.view(torch.int32)


def _filled(words: torch.Tensor) -> torch.Tensor:
    grown = words.new_zeros(aligned(len(words)))
    grown[: len(words)] = words
    return grown
