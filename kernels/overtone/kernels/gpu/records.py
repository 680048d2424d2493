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
begins, and the last one ends (blocks + 1 of them). That is smaller than row pointers where a core has fewer entries than
rows, and smaller than coordinates everywhere, and a tile of 16 places is found without a search. Entry i is values[i] *
scale: float32 values have scale 1, 16-bit ones (float16, whatever the arena's numbers) are at most 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from overtone.kernels.gpu.plans import Plan

ALIGNMENT = 4
"""Words: 16 bytes."""
HEADER = 4
"""Words before a record's parts."""
_NARROW = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """words: (n,) int32, on the host; directories: where the directory of each kind begins."""

    words: torch.Tensor
    directories: Mapping[str, int]


def extent_of(slots: int, kinds: Mapping[str, Mapping[int, torch.Tensor]]) -> Extent:
    """kinds: records by slot; a record that several slots name is one tensor, kept once."""
    head = aligned(slots)
    parts: list[torch.Tensor] = [torch.zeros(head, dtype=torch.int32) for _ in kinds]
    begins: dict[int, int] = {}
    end = head * len(kinds)
    for at, by_slot in enumerate(kinds.values()):
        for slot, record in by_slot.items():
            if id(record) not in begins:
                assert len(record) % ALIGNMENT == 0
                begins[id(record)] = end
                parts.append(record)
                end += len(record)
            parts[at][slot] = begins[id(record)] - at * head
    words = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
    return Extent(words, {kind: at * head for at, kind in enumerate(kinds)})


def spectral_record(
    rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, inverse: Plan, dtype: torch.dtype
) -> torch.Tensor:
    """rows: (n,) indices of coefficients of `inverse`, of its transform's output; cols: (n,) places of the input's, below
    65536; values: (n,), with the transforms' weights; dtype: of the values, float32 or float16."""
    block, local = inverse.block_of(rows.long())
    order = torch.argsort(block * 2**24 + local * 2**16 + cols.long())
    block, local, cols, values = block[order], local[order], cols.long()[order], values.double()[order]
    scale = 1.0 if dtype is torch.float32 else max(values.abs().max().item() if len(values) else 0.0, 1e-30)
    ends = torch.zeros(inverse.blocks + 1, dtype=torch.int64)
    ends[1:] = torch.bincount(block, minlength=inverse.blocks).cumsum(0)
    wide = len(values) >= _NARROW
    header = torch.tensor([len(values), 0, int(wide), 0], dtype=torch.int32)
    header[1:2] = torch.tensor([scale], dtype=torch.float32).view(torch.int32)
    parts = [header, _words((values / scale).to(dtype)), _words(_short(cols)), _words(_short(ends % _NARROW))]
    if wide:
        parts.append(_words(_short(ends // _NARROW)))
    return _filled(torch.cat([*parts, _words(local.to(torch.uint8))]))


def pair_record(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """down: (r, q); up: (r, p); dtype: of the arena's numbers."""
    assert len(down) == len(up)
    parts = [_filled(_words(part.to(dtype).flatten())) for part in (down, up)]
    return torch.cat([torch.tensor([len(up), 0, 0, 0], dtype=torch.int32), *parts])


def expand_record(up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """up: (r, p); dtype: of the arena's numbers."""
    return torch.cat([torch.tensor([len(up), 0, 0, 0], dtype=torch.int32), _filled(_words(up.to(dtype).flatten()))])


def aligned(words: int) -> int:
    return -(-words // ALIGNMENT) * ALIGNMENT


def _short(numbers: torch.Tensor) -> torch.Tensor:
    """The low 16 bits of each, as int16."""
    return torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16)


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
