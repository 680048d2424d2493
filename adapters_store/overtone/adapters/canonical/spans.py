"""Slices of vectors, as a layout says them: checked before anything is cut with them."""

from __future__ import annotations

from collections.abc import Iterable

_LARGEST = 2**31 - 1
"""What int32 holds, in which the kernels count."""


def natural(value: object) -> int:
    """`value`, or ValueError unless it is a whole number from 1 to 2^31 - 1."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError("no number of things")
    return value


def shape_of(value: object) -> tuple[int, int]:
    """(p, q) of a list of both, or ValueError."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("no shape of a matrix")
    return natural(value[0]), natural(value[1])


def span_of(offset: object, count: object) -> tuple[int, int]:
    """(start, stop) of `count` >= 1 things from `offset` >= 0, or ValueError."""
    if type(offset) is not int or offset < 0:
        raise ValueError("no offset")
    return offset, offset + natural(count)


def tile(spans: Iterable[tuple[int, int]]) -> int:
    """How long they are together, or ValueError unless each begins where the one before it ends, the first at 0."""
    end = 0
    for start, stop in sorted(set(spans)):
        if start != end:
            raise ValueError("there is a gap, or two things overlap")
        end = stop
    return end
