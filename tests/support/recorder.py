"""The other side of an engine: records what it reports and checks that every request ends once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from overtone.engine.engine import Engine
from overtone.engine.types import Event, Finish, Request, StepReport, StepStats
from overtone.errors import OvertoneError

HANG_S = 60.0
"""A guard against hangs, far above what any step takes."""


class Recorder:
    """An engine's `report`. on_report, if set, is called with each report, in the engine's thread."""

    def __init__(self, on_report: Callable[[StepReport], None] | None = None) -> None:
        self.on_report = on_report
        self.stats: list[StepStats] = []
        self._events: defaultdict[str, list[Event]] = defaultdict(list)
        self._news = threading.Condition()

    def __call__(self, report: StepReport) -> None:
        with self._news:
            self.stats.append(report.stats)
            for event in report.events:
                self._events[event.request_id].append(event)
            self._news.notify_all()
        if self.on_report is not None:
            self.on_report(report)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Blocks until `condition`, evaluated after each report, holds."""
        with self._news:
            assert self._news.wait_for(condition, HANG_S), "the engine hangs"

    def wait(self, *request_ids: str) -> None:
        """Blocks until each request has had its last event."""
        self.wait_until(lambda: all(any(e.last for e in self._events[name]) for name in request_ids))

    def events(self, request_id: str) -> list[Event]:
        with self._news:
            return list(self._events[request_id])

    def last(self, request_id: str) -> Event:
        """The last event, of which there is exactly one, and nothing after it."""
        events = self.events(request_id)
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True], events
        return events[-1]

    def finish(self, request_id: str) -> Finish:
        last = self.last(request_id)
        assert last.error is None, repr(last.error)
        assert last.finish is not None
        return last.finish

    def error(self, request_id: str) -> OvertoneError:
        last = self.last(request_id)
        assert last.error is not None, last
        assert last.finish is None
        return last.error

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events(request_id) for token in event.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(event.text for event in self.events(request_id))


def drip(engine: Engine, requests: Sequence[Request], every: int) -> Callable[[StepReport], None]:
    """An `on_report` that submits the next of `requests` after each `every`-th step, or when the engine runs dry."""
    left = list(reversed(requests))
    steps = 0

    def submit_next(report: StepReport) -> None:
        nonlocal steps
        steps += 1
        dry = not report.stats.running and not report.stats.waiting
        if left and (dry or steps % every == 0):
            engine.submit(left.pop())

    return submit_next


def serve(engine: Engine, recorder: Recorder, requests: Iterable[Request], early: int | None = None) -> None:
    """Runs `engine`, not yet started, on `requests` to the end of all of them. `early` of them are there from the start
    (None: all), each other one comes two steps after the one before."""
    requests = list(requests)
    if early is not None:
        recorder.on_report = drip(engine, requests[early:], every=2)
    for request in requests[:early]:
        engine.submit(request)
    engine.start()
    try:
        recorder.wait(*(request.request_id for request in requests))
    finally:
        engine.stop()
