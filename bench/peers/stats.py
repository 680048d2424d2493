"""Numbers of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """One request: seconds since the run's start. `events`: arrival and number of tokens of each piece that had any."""

    index: int
    sent: float
    events: tuple[tuple[float, int], ...]

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.events)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, by linear interpolation between order statistics (numpy's default)."""
    if not values:
        raise ValueError("no values")
    if not 0 <= q <= 100:
        raise ValueError(f"q must be within 0..100, is {q}")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(traces: Sequence[Trace]) -> dict[str, float]:
    """Tokens/s from the first request sent to the last token; time to the first token and gaps between pieces, in ms.

    A gap is the time between two arrivals, whatever the number of tokens in them: what a reader of the stream sees.
    """
    firsts = [(trace.events[0][0] - trace.sent) * 1e3 for trace in traces]
    gaps = [(b[0] - a[0]) * 1e3 for t in traces for a, b in zip(t.events, t.events[1:], strict=False)]
    elapsed = max(t.events[-1][0] for t in traces) - min(t.sent for t in traces)
    numbers = {"tokens_per_s": sum(t.tokens for t in traces) / elapsed, "seconds": elapsed}
    for name, values in (("ttft", firsts), ("itl", gaps)):
        numbers |= {f"{name}_p{q}_ms": percentile(values, q) if values else math.nan for q in (50, 99)}
    return {name: round(value, 3) for name, value in numbers.items()}
