"""Latencies in buckets of equal relative width: quantiles of any number of them in a few hundred bytes.

Three kinds share one histogram: a key is the kind and the bucket. Bucket i holds what is above `_LEAST_S * _RATIO**(i - 1)`
and at most `_LEAST_S * _RATIO**i`; what is below 0.1 ms is in the first one, what is above 19 hours in the last.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

RELATIVE_ERROR = 0.08
"""Of a quantile against the latency that has its rank."""
_RATIO = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LEAST_S = 1e-4
_BUCKETS = 128
_STEPS = 1 / math.log(_RATIO)
_ENTRY = struct.Struct("<HQ")


class Latency(IntEnum):
    """Arrival to first token, token to token, arrival to last token."""

    FIRST_TOKEN = 0
    INTER_TOKEN = 1
    TOTAL = 2


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; zeros if there was none."""

    count: int
    p50: float
    p90: float
    p99: float


def key_of(kind: Latency, seconds: float) -> int:
    """Where a latency is counted."""
    bucket = 0
    if seconds > _LEAST_S:
        bucket = min(math.ceil(math.log(seconds / _LEAST_S) * _STEPS), _BUCKETS - 1)
    return kind * _BUCKETS + bucket


def pack(counts: Mapping[int, int]) -> bytes:
    """How often each key came, in ten bytes a key."""
    return b"".join([_ENTRY.pack(key, counts[key]) for key in sorted(counts)])


def unpack(packed: bytes) -> dict[int, int]:
    return dict(_ENTRY.iter_unpack(packed))


def quantiles(counts: Mapping[int, int], kind: Latency) -> Quantiles:
    """p50: the least latency that at least half of all do not exceed, and so on."""
    own = _by_kind(counts)[kind]
    total = sum(count for _, count in own)
    return Quantiles(total, *(_seconds(_bucket(own, percent)) if total else 0.0 for percent in (50, 90, 99)))


def buckets(counts: Mapping[int, int], percent: int) -> list[int]:
    """For each kind the bucket of a quantile: larger for larger ones, 0 if there is none."""
    return [_bucket(own, percent) for own in _by_kind(counts)]


def _by_kind(counts: Mapping[int, int]) -> list[list[tuple[int, int]]]:
    """(bucket, count), by bucket."""
    found: list[list[tuple[int, int]]] = [[] for _ in Latency]
    for key in sorted(counts):
        found[key // _BUCKETS].append((key % _BUCKETS, counts[key]))
    return found


def _bucket(own: list[tuple[int, int]], percent: int) -> int:
    rank, seen = math.ceil(sum([count for _, count in own]) * percent / 100), 0
    for number, count in own:
        seen += count
        if seen >= rank:
            return number
    return 0


def _seconds(number: int) -> float:
    """The middle of a bucket, by ratio."""
    return _LEAST_S * _RATIO**number * 2 / (1 + _RATIO)
