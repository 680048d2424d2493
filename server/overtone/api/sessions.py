"""The asyncio side of the engine: one `Session` per running call, fed by one cross-thread call per step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from overtone.adapters.store import Lease
from overtone.api.metrics import Metrics
from overtone.api.statistics import AdapterStatistics, Use
from overtone.api.usage import Measured, outcome_of
from overtone.engine.engine import Engine
from overtone.engine.types import Event, Request, StepReport


class Session:
    """The events of the generations of one call. A slow reader finds several at once: nothing piles up as messages."""

    def __init__(self, requests: Sequence[Request], lease: Lease | None) -> None:
        self.lease = lease
        self.open = {r.request_id: Measured(r.arrival_time, len(r.prompt_ids)) for r in requests}
        self.uses: tuple[Use, ...] = ()
        self._events: list[Event] = []
        self._ready = asyncio.Event()

    def push(self, event: Event) -> None:
        self._events.append(event)
        self._ready.set()

    async def take(self) -> list[Event]:
        """All events since the last call; waits for the first. Raises a generation's error once the rest is taken."""
        if not self._events:
            self._ready.clear()
            await self._ready.wait()
        if self._events[0].error is not None:
            raise self._events[0].error
        failed = next((i for i, event in enumerate(self._events) if event.error is not None), len(self._events))
        events, self._events = self._events[:failed], self._events[failed:]
        return events


class SessionTable:
    """Routes step reports, which come from the engine's thread, to the sessions on the event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, metrics: Metrics, statistics: AdapterStatistics, executor: Executor
    ) -> None:
        self._loop = loop
        self._metrics, self._statistics = metrics, statistics
        self._executor = executor
        self._sessions: dict[str, Session] = {}

    def report(self, report: StepReport) -> None:
        """For the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliver, report)

    def submit(self, engine: Engine, requests: Sequence[Request], lease: Lease | None) -> Session:
        """Queues the requests of one call, all or none. Their session keeps the adapter pinned until the last event of the
        last of them, whoever reads it."""
        session = Session(requests, lease)
        self._sessions |= dict.fromkeys(session.open, session)
        try:
            engine.submit_all(requests)
        except BaseException:
            for request in requests:
                self._close(request.request_id)
            raise
        self._metrics.count_prompt(sum(len(request.prompt_ids) for request in requests))
        names = {share.adapter_id for share in lease.shares if share.adapter_id} if lease else set()
        session.uses = tuple(map(self._statistics.begin, names))
        return session

    def _deliver(self, report: StepReport) -> None:
        self._metrics.observe_step(report.stats)
        now = time.monotonic()
        for event in report.events:
            session = self._sessions.get(event.request_id)
            if session is None:
                continue
            self._measure(event, session, now)
            session.push(event)
            if event.last:
                self._close(event.request_id)

    def _measure(self, event: Event, session: Session, now: float) -> None:
        measured = session.open[event.request_id]
        if event.token_ids:
            observe = self._metrics.observe_inter_token if measured.started else self._metrics.observe_first_token
            observe(measured.tokens(len(event.token_ids), now))
            self._metrics.count_tokens(len(event.token_ids))
        if event.finish:
            self._metrics.observe_finish(event.finish.queue_s, event.finish.total_s)
            measured.ended(event.finish.total_s)
        if event.last:
            outcome = event.finish.reason.value if event.finish else event.error.reason.lower() if event.error else ""
            self._metrics.count_request(outcome, adapted=session.lease is not None)
            for use in session.uses:
                self._statistics.end(use, measured, outcome_of(event))

    def _close(self, request_id: str) -> None:
        session = self._sessions.pop(request_id)
        del session.open[request_id]
        if session.lease is not None and not session.open:
            # May delete a file: not on the event loop.
            self._executor.submit(session.lease.release)
