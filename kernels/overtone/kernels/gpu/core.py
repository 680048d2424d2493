"""What the kernels read of a spectral record (`overtone.kernels.gpu.records`), and what they make of it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def record_at(words_ptr, directory, slot):
    """The word where the slot's record begins; the directory's own first word: none."""
    return directory + tl.load(words_ptr + directory + slot)


@triton.jit
def parts_at(words_ptr, record, blocks, VALUES: tl.constexpr):
    """n, scale, and where values, columns, ends, places begin, each in its own units; VALUES: in a word. The ends' high
    16 bits begin where the low ones do, if there are none."""
    n = tl.load(words_ptr + record)
    scale = tl.load(words_ptr + record + 1).to(tl.float32, bitcast=True)
    wide = tl.load(words_ptr + record + 2)
    values = record + 4
    cols = values + (n + VALUES - 1) // VALUES
    ends = cols + (n + 1) // 2
    high = ends + tl.where(wide > 0, (blocks + 2) // 2, 0)
    places = high + (blocks + 2) // 2
    return n, scale, values * VALUES, cols * 2, ends * 2, high * 2, places * 4


@triton.jit
def end_at(shorts_ptr, ends, high, n, block):
    """Before which entry the block begins; at most n, whatever the record says."""
    end = tl.load(shorts_ptr + ends + block).to(tl.int32) & 0xFFFF
    more = tl.load(shorts_ptr + high + block, mask=(block >= 0) & (high > ends), other=0).to(tl.int32) & 0xFFFF
    return tl.maximum(tl.minimum(end + more * 65536, n), 0)


@triton.jit
def gathered(
    words_ptr, shorts_ptr, octets_ptr, values_ptr, record, blocks, block, z_ptr, inputs, VALUES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C, 16): K z at the places of `block`, (BLOCK_C,); and the longest run of entries, 0: all of it is zeros."""
    n, scale, values, cols, ends, high, places = parts_at(words_ptr, record, blocks, VALUES)
    begin = end_at(shorts_ptr, ends, high, n, block)
    end = end_at(shorts_ptr, ends, high, n, block + 1)
    longest = tl.max(end - begin, 0)
    u = tl.zeros((BLOCK_C, 16), tl.float32)
    for j in range(0, longest, BLOCK_J):
        entry = begin[:, None] + j + tl.arange(0, BLOCK_J)[None, :]
        has = entry < end[:, None]
        col = tl.load(shorts_ptr + cols + entry, mask=has, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(values_ptr + values + entry, mask=has, other=0.0).to(tl.float32) * scale
        local = tl.load(octets_ptr + places + entry, mask=has, other=0).to(tl.int32)
        value = value * tl.load(z_ptr + col, mask=has & (col < inputs), other=0.0).to(tl.float32)
        u += tl.sum(tl.where(local[:, :, None] == tl.arange(0, 16)[None, None, :], value[:, :, None], 0.0), 1)
    return u, longest
