"""What it costs to bring an adapter into memory, from the loads so far."""

from __future__ import annotations

from overtone.adapters.resident import Source

LEAST_S, MOST_S = 1e-4, 10.0
"""One stall, or one load from a page that happened to be cached, says little of the next."""
_NEWEST = 1 / 16


class LoadCosts:
    """Seconds, between `LEAST_S` and `MOST_S`. Not thread-safe."""

    def __init__(self) -> None:
        self._usual: dict[Source, float] = {}

    def measured(self, source: Source, seconds: float) -> float:
        """The cost of what took so long: halfway between that and what is usual for its source."""
        seconds = min(max(seconds, LEAST_S), MOST_S)
        usual = self._usual.get(source, seconds)
        self._usual[source] = usual + (seconds - usual) * _NEWEST
        return (seconds + usual) / 2

    def usual(self, source: Source) -> float:
        return self._usual.get(source, LEAST_S)
