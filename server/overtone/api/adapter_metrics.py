"""Prometheus counters of the most used adapters, with one series for all others.

How each request is counted once although adapters come into the top and leave it:

- An adapter's series counts from the scrape at which it came into the top: it begins at 0, and does so again should the
  adapter come back, which Prometheus takes for a restart. What the adapter gets while it is out is never in its series.
- `__other__` shows all requests of all adapters less those that were shown as an increase of an adapter's own series. What
  an adapter had before it came in stays there, so `__other__` does not fall when it comes in; what it gets between its last
  scrape in the top and its leaving was not shown, so `__other__` has it. Between two scrapes all requests rise by at least
  what the top's rise by, so `__other__` never falls.

So each request is in the increase of exactly one series, and the sum of all rates is the rate of all requests. For their
number there is `overtone_requests_total`. With several scrapers one may miss the 0 at which a series begins again; only how
that adapter's requests are shared out is then settled by whoever scrapes first.

Labels are ids of adapters that were used, never what a client merely sent. The series of a deleted adapter is gone with the
next scrape; should an adapter of that name come again its series begins anew, as after a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overtone.api.statistics import AdapterStatistics, Counts

OTHER = "__other__"
"""No adapter's id: those begin with a letter or a digit."""
_FAMILIES = {  # as the fields of `Counts`
    "requests": "Generations ended, by adapter: the most used ones, and all others together",
    "generated_tokens": "Tokens of ended generations, likewise",
    "errors": "Generations that ended with an error or at their deadline, likewise",
}


@dataclass(frozen=True, slots=True)
class _Series:
    """now: all that the adapter has; base: what it had when it came into the top."""

    now: Counts
    base: Counts

    @property
    def shown(self) -> Counts:
        return _each(int.__sub__, self.now, self.base)


class AdapterSeries(Collector):
    """Read when somebody scrapes, in the scraper's thread. labelled: whether adapters have series at all."""

    def __init__(self, statistics: AdapterStatistics, *, labelled: bool) -> None:
        self._statistics, self._labelled = statistics, labelled
        self._lock = threading.Lock()
        self._last: dict[str, _Series] = {}
        self._seen = Counts()
        """What the series of adapters have risen by, in all."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "overtone_adapters_tracked", "Adapters with statistics of their own", self._statistics.tracked
        )
        yield CounterMetricFamily(
            "overtone_adapters_folded", "Adapters that lost them to others", value=self._statistics.folded
        )
        if not self._labelled:
            return
        leaders, other = self._read()
        yield CounterMetricFamily(
            "overtone_adapter_label_overflow", "Generations counted under no adapter's name", value=other.requests
        )
        for name, text in _FAMILIES.items():
            family = CounterMetricFamily(f"overtone_adapter_{name}", text, labels=["adapter"])
            for adapter_id, counts in {**leaders, OTHER: other}.items():
                family.add_metric([adapter_id], getattr(counts, name))
            yield family

    def _read(self) -> tuple[dict[str, Counts], Counts]:
        with self._lock:
            leaders, everything = self._statistics.leaders()
            found = {each: self._since(now, self._last.get(each)) for each, now in leaders.items()}
            for each in found.keys() & self._last.keys():
                self._seen = _each(_risen, self._seen, found[each].shown, self._last[each].shown)
            self._last = found
            return {each: series.shown for each, series in found.items()}, _each(int.__sub__, everything, self._seen)

    def _since(self, now: Counts, before: _Series | None) -> _Series:
        """A count that fell is that of another adapter of the same id."""
        if before is None:
            return _Series(now, now)
        base = _each(lambda new, old, base: base if new >= old else 0, now, before.now, before.base)
        return _Series(now, base)


def _risen(total: int, now: int, before: int) -> int:
    """As Prometheus sees it: a value that fell has begun anew."""
    return total + (now - before if now >= before else now)


def _each(combine: Callable[..., int], *counts: Counts) -> Counts:
    """Field by field."""
    return Counts(*(combine(*(getattr(each, name) for each in counts)) for name in _FAMILIES))
