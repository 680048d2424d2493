"""The engine's thread: schedule, run, postprocess, report; one call to the outside per step.

Other threads use `submit`, `cancel`, `stop_accepting` and `stop`; everything else belongs to the engine's own thread.
Knows nothing of gRPC or of how adapters come into memory.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceABC

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.deadlines import Deadlines
from overtone.engine.detokenizer import Detokenizer
from overtone.engine.flight import AheadRunner, Flight, can_fly
from overtone.engine.logprobs import take_prompt_logprobs
from overtone.engine.prefix import PrefixCache
from overtone.engine.queue_limits import QueueLoad, check_queue
from overtone.engine.rows import DecodeRows
from overtone.engine.sampler import Sampled, sample
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.engine.sequence import Sequence
from overtone.engine.steps import EventBuilder
from overtone.engine.types import Event, Request, StepReport, StepStats
from overtone.errors import Cancelled, DeadlineExceeded, Draining, EngineError, OvertoneError, PromptTooLong

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 8

Runner = Callable[[StepPlan], torch.Tensor]
"""A step's plan -> logits (S + P, vocabulary): of the S chunks that complete, then of the P prompt tokens that
`logprobs.prompt_rows` names; any floating dtype."""


class Engine:
    """Continuous batching over `run`. `report` is called from the engine's thread, once after every step; `on_death` once
    if the engine cannot go on; `on_idle` when nothing is left to do; `on_queued` with each request that is taken in.

    ahead: `run` is its method, and while the device computes a step of greedy rows, the next one is begun and the last
    one's tokens are told: the device never waits for the host (see `_step_ahead`). nice: how far its thread, and those that
    compute for it, stand back from all others.
    """

    def __init__(
        self,
        run: Runner,
        decode: Callable[[SequenceABC[int]], str],
        eos_token_ids: frozenset[int],
        config: EngineConfig,
        report: Callable[[StepReport], None],
        on_death: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
        on_queued: Callable[[Request], None] = lambda _: None,
        ahead: AheadRunner | None = None,
        nice: int = 0,
    ) -> None:
        self._run = run
        self._ahead, self._nice = ahead, nice
        self._flight: Flight | None = None  # begun, its tokens not yet told
        self._on_queued = on_queued
        self._decode = decode
        self._config = config
        self._report = report
        self._on_death = on_death
        self._on_idle = on_idle
        self._failed_steps = 0
        self._scheduler = Scheduler(config)
        self._decode_rows = DecodeRows()
        self._eos = eos_token_ids
        self._builder = EventBuilder(eos_token_ids)
        self._wake = threading.Condition()
        self._sequences: dict[str, Sequence] = {}
        self._deadlines = Deadlines()
        self._submitted: list[Request] = []  # these six under _wake
        self._dead: EngineError | None = None
        self._cancelled: dict[str, OvertoneError] = {}
        self._load = QueueLoad()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="overtone-engine", daemon=True)

    # -- for other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """`submit_all` of one."""
        self.submit_all([request])

    def submit_all(self, requests: SequenceABC[Request]) -> None:
        """Queues requests of one tenant, all or none. After a return the events of each end with one that is `last`.

        Raises `PromptTooLong` for one that could never fit, `QueueFull`, `InvalidRequest` for more than ever may wait,
        `Draining`, and `EngineError` once the engine is dead.
        """
        limit, longest = self._config.max_context_tokens, max(request.max_tokens for request in requests)
        if longest > limit:
            raise PromptTooLong(f"{longest} tokens exceed the context of {limit}", field="prompt")
        with self._wake:
            if self._dead is not None:
                raise self._dead
            if self._draining or self._stopping:
                raise Draining("the server is shutting down")
            check_queue(self._config, self._load, requests)
            for request in requests:
                self._load.count(request)
            self._submitted += requests
            self._wake.notify()

    def cancel(self, request_id: str, error: OvertoneError | None = None) -> None:
        """Ends a request before the next step, with `error` as its last event. Unknown ids are ignored."""
        with self._wake:
            self._cancelled[request_id] = error or Cancelled("the request was cancelled")
            self._wake.notify()

    def stop_accepting(self) -> None:
        """From now on `submit` raises `Draining`; what is queued or running goes on."""
        with self._wake:
            self._draining = True

    def stop(self) -> None:
        """Ends all requests with `Draining` and the thread with them."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def pages(self) -> PrefixCache:
        """Of the KV cache; for the engine's thread."""
        return self._scheduler.pages

    # -- the engine's thread

    def _loop(self) -> None:
        """The thread. Whatever escapes ends every request with an error, and the owner hears of it."""
        if self._nice and sys.platform == "linux":  # elsewhere it would be the whole process
            os.nice(self._nice)  # of this thread, and of those that it starts
        try:
            self._serve()
        except BaseException:  # a panic in a library written in Rust is no Exception
            log.critical("the engine died", exc_info=True)
            self._die(EngineError("the engine has failed and serves no more"))

    def _die(self, error: EngineError) -> None:
        with self._wake:
            self._dead = error
            submitted, self._submitted = self._submitted, []
        requests = [*(sequence.request for sequence in self._scheduler), *submitted]
        self._deliver(StepReport(tuple(Event(request.request_id, error=error) for request in requests)))
        self._on_death()

    def _serve(self) -> None:
        while True:
            with self._wake:
                idle = self._flight is None and not self._scheduler.running and not self._scheduler.load.requests
                if idle and not self._submitted and not self._cancelled and not self._stopping:
                    self._decode_rows.forget()
                    self._on_idle()
                    self._wake.wait()
                submitted, self._submitted = self._submitted, []
                cancelled, self._cancelled = self._cancelled, {}
                stopping = self._stopping
            events = self._admit(submitted, cancelled)
            if stopping:
                events += [self._end(s, Draining("the server is shutting down")) for s in list(self._scheduler)]
                self._deliver(StepReport(tuple(events), self._stats()))
                return
            self._step(events)

    def _step(self, events: list[Event]) -> None:
        """schedule -> run -> postprocess."""
        started = time.monotonic()
        flight, self._flight = self._flight, None
        if flight is not None:
            self._step_ahead(flight, events, started)
            return
        plan = self._scheduler.schedule()
        with self._wake:
            self._load = self._scheduler.load.copy()
            for request in self._submitted:
                self._load.count(request)
        if plan is not None:
            plan = self._decode_rows.arrange(plan)
            self._mark_admitted(plan, started)
            try:
                logits = self._run(plan)
                choice = self._ahead.choose(logits) if self._ahead is not None and can_fly(plan) else None
                if choice is None:
                    self._postprocess(plan, logits, events)
                else:
                    self._flight = Flight(plan, choice)
                self._failed_steps = 0
            except BaseException as error:
                self._fail(plan, error, events)
        self._report_step(events, None if self._flight else plan, started)

    def _step_ahead(self, flight: Flight, events: list[Event], started: float) -> None:
        """Begins the step after `flight`, if it can be said which that is, then tells what `flight` chose."""
        assert self._ahead is not None
        following = None if self._submitted or self._stopping else self._scheduler.look_ahead(flight.plan)
        failure: BaseException | None = None
        if following is not None:
            try:
                choice = self._ahead.choose(self._ahead.run(following, flight.tokens_of(following)))
                assert choice is not None, "its rows are a part of those before"
                self._flight = Flight(following, choice)
            except BaseException as error:
                failure = error
        try:
            self._advance(flight.plan, zip(flight.sequences, flight.sampled(), strict=True), events)
            self._failed_steps = 0
        except BaseException as error:
            self._flight = None
            self._fail(flight.plan, error, events)
        if failure is not None and following is not None:  # the tokens before it stand
            self._fail(following, failure, events)
        self._report_step(events, flight.plan, started)

    def _fail(self, plan: StepPlan, error: BaseException, events: list[Event]) -> None:
        log.error("a step failed; its %d requests end with an error", len(plan.chunks), exc_info=error)
        failure = error if isinstance(error, OvertoneError) else EngineError("the model failed on this batch")
        events += [self._end(c.sequence, failure) for c in plan.chunks if c.sequence.rank is not None]
        self._failed_steps += 1

    def _report_step(self, events: list[Event], plan: StepPlan | None, started: float) -> None:
        self._deliver(StepReport(tuple(events), self._stats(plan, time.monotonic() - started)))
        if self._failed_steps >= _MAX_FAILED_STEPS:
            # One bad batch is an accident; this is a device that will not come back.
            raise EngineError(f"{_MAX_FAILED_STEPS} steps in a row have failed")

    def _deliver(self, report: StepReport) -> None:
        try:
            self._report(report)
        except Exception:
            log.exception("a step's report was refused")

    def _admit(self, submitted: list[Request], cancelled: dict[str, OvertoneError]) -> list[Event]:
        """Takes in new requests; ends those that were cancelled or are out of time."""
        events: list[Event] = []
        for request in submitted:
            stopping = request.stopping
            try:
                detokenizer = Detokenizer(
                    self._decode, request.prompt_ids, stopping.stop, include_stop=stopping.include_stop
                )
            except BaseException:
                log.exception("a prompt was refused by the tokenizer")
                events.append(Event(request.request_id, error=EngineError("the tokenizer refused the prompt")))
                continue
            sequence = self._sequences[request.request_id] = Sequence(request, detokenizer)
            self._scheduler.add(sequence)
            self._deadlines.add(sequence)
            self._on_queued(request)
        for request_id, error in cancelled.items():
            if request_id in self._sequences:
                events.append(self._end(self._sequences[request_id], error))
        for sequence in self._deadlines.passed(time.monotonic()):
            events.append(self._end(sequence, DeadlineExceeded("the request's deadline passed")))
        return events

    def _mark_admitted(self, plan: StepPlan, now: float) -> None:
        for chunk in plan.chunks:
            if chunk.sequence.admitted_time is None:
                chunk.sequence.admitted_time = now

    def _postprocess(self, plan: StepPlan, logits: torch.Tensor, events: list[Event]) -> None:
        """Appends to `events` one by one: what ended before a failure stays told."""
        completed = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        sampled = sample(logits[: len(completed)], completed, self._eos)
        take_prompt_logprobs(plan, logits[len(completed) :])
        self._advance(plan, zip(completed, sampled, strict=True), events)

    def _advance(self, plan: StepPlan, choices: Iterable[tuple[Sequence, Sampled]], events: list[Event]) -> None:
        """choices: of the sequences whose chunks complete. What has ended since the step was begun is passed over."""
        chosen = [(sequence, choice) for sequence, choice in choices if sequence.rank is not None]
        unsound = {sequence for sequence, choice in chosen if choice.token_id is None}
        for sequence in unsound:
            self._scheduler.pages.withdraw(sequence)
        for chunk in plan.chunks:
            if chunk.sequence.rank is not None:
                self._scheduler.advance(chunk, sound=chunk.sequence not in unsound)
        for sequence, choice in chosen:
            event = self._builder.advance(sequence, choice, time.monotonic())
            if event.last:
                self._remove(sequence)
            events.append(event)

    def _end(self, sequence: Sequence, error: OvertoneError) -> Event:
        self._remove(sequence)
        return Event(sequence.request.request_id, error=error)

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._deadlines.remove(sequence)
        if self._sequences.get(sequence.request.request_id) is sequence:
            del self._sequences[sequence.request.request_id]

    def _stats(self, plan: StepPlan | None = None, duration_s: float = 0.0) -> StepStats:
        chunks = plan.chunks if plan else ()
        pages = self._scheduler.pages
        counts = pages.take_counts()
        return StepStats(
            duration_s=duration_s,
            running=len(self._scheduler.running),
            waiting=self._scheduler.load.requests,
            pages_used=pages.used,
            pages_total=pages.total,
            prefill_tokens=sum(c.length for c in plan.prefills) if plan else 0,
            decode_tokens=len(plan.decodes) if plan else 0,
            chunks=len(chunks),
            distinct_adapters=len({c.sequence.request.adapter_key for c in chunks} - {""}),
            preemptions=plan.preempted if plan else 0,
            pages_cached=pages.cached,
            prefix_query_tokens=counts.query_tokens,
            prefix_hit_tokens=counts.hit_tokens,
            prefix_evictions=counts.evictions,
        )
