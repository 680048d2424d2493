"""Prometheus counters of the most used adapters, with one series for all others.

How every series can only rise although adapters come into the top and leave it:

- An adapter in the top shows its exact totals. They only rise. When it comes in, its series begins at what it has by then;
  Prometheus counts no increase for the first value of a series.
- `__other__` shows all requests of all adapters less those that were *shown as an increase* of an adapter's own series:
  from one scrape to the next, of the adapters that were in the top at both. What an adapter had before it came in has never
  been shown as an increase, so it stays in `__other__`, which does not fall when an adapter comes in; what it gets between
  its last scrape in the top and its leaving was not shown either, so `__other__` has it. Between two scrapes all requests
  rise by at least what the top's rise by, so `__other__` never falls.

So each request is in the increase of exactly one series, and the sum of all rates is the rate of all requests. The sum of
the series' values is larger than their number: for that there is `overtone_requests_total`. With several scrapers each sees
rising series; only how an adapter's last requests before it leaves are shared out is then settled by whoever scrapes first.

Labels are ids of adapters that were used, never what a client merely sent. The series of a deleted adapter is gone with the
next scrape; should an adapter of that name come again its series begins anew, as after a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

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


class AdapterSeries(Collector):
    """Read when somebody scrapes, in the scraper's thread. labelled: whether adapters have series at all."""

    def __init__(self, statistics: AdapterStatistics, *, labelled: bool) -> None:
        self._statistics, self._labelled = statistics, labelled
        self._lock = threading.Lock()
        self._last: dict[str, Counts] = {}
        self._shown = Counts()

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
            for adapter_id, before in self._last.items():
                if (now := leaders.get(adapter_id)) is not None:
                    self._shown = _each(lambda sum, new, old: sum + _increase(new, old), self._shown, now, before)
            self._last = leaders
            return leaders, _each(int.__sub__, everything, self._shown)


def _increase(now: int, before: int) -> int:
    """As Prometheus sees it: a value that fell has begun anew."""
    return now - before if now >= before else now


def _each(combine: Callable[..., int], *counts: Counts) -> Counts:
    """Field by field."""
    return Counts(*(combine(*(getattr(each, name) for each in counts)) for name in _FAMILIES))
