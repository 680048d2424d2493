"""Where in the arena a program finds what it computes with (`overtone.kernels.gpu.records`).

What is read from the arena's words is not trusted: a record that does not lie within the arena is none, and a rank is at
most what the launch was made for, so that a program reads and writes nothing beside its tensors, whatever the words are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from overtone.kernels.gpu.records import ALIGNMENT, HEADER

_ALIGNMENT = tl.constexpr(ALIGNMENT)
_HEADER = tl.constexpr(HEADER)


@triton.jit
def record_of(words_ptr, directory, slot, total):
    """The word where the record of `slot` begins, int64; -1: there is none. total: words of the arena."""
    offset = tl.load(words_ptr + directory + slot).to(tl.int64)
    # A multiple of the alignment by construction, so that loads may be wide.
    record = (directory + offset) // _ALIGNMENT * _ALIGNMENT
    return tl.where((offset != 0) & (record >= 0) & (record + _HEADER <= total), record, -_ALIGNMENT)


@triton.jit
def pair_of(words_ptr, numbers_ptr, directory, slot, inputs, width, most, total):
    """A pair's rank, 0 where there is none within the arena, and at which numbers D and U begin."""
    per: tl.constexpr = 32 // numbers_ptr.dtype.element_ty.primitive_bitwidth
    group: tl.constexpr = _ALIGNMENT * per
    record = record_of(words_ptr, directory, slot, total)
    rank = tl.load(words_ptr + record, mask=record >= 0, other=0)
    rank = tl.minimum(tl.maximum(rank, 0), most)
    down = (record + _HEADER) * per
    up = down + (rank.to(tl.int64) * inputs + group - 1) // group * group
    return tl.where(up + rank.to(tl.int64) * width <= total.to(tl.int64) * per, rank, 0), down, up


@triton.jit
def up_of(words_ptr, numbers_ptr, directory, slot, width, most, total):
    """The same of an `expand` record: its rank, and at which number U begins."""
    per: tl.constexpr = 32 // numbers_ptr.dtype.element_ty.primitive_bitwidth
    record = record_of(words_ptr, directory, slot, total)
    rank = tl.load(words_ptr + record, mask=record >= 0, other=0)
    rank = tl.minimum(tl.maximum(rank, 0), most)
    up = (record + _HEADER) * per
    return tl.where(up + rank.to(tl.int64) * width <= total.to(tl.int64) * per, rank, 0), up
