"""The engine's thread: schedule, run, postprocess, report; one call to the outside per step.

Other threads use `submit`, `cancel`, `stop_accepting` and `stop`; everything else belongs to the engine's own thread.
Knows nothing of gRPC or of how adapters come into memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.detokenizer import Detokenizer
from overtone.engine.logprobs import take_prompt_logprobs
from overtone.engine.sampler import sample
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.engine.sequence import Sequence
from overtone.engine.steps import EventBuilder
from overtone.engine.types import Event, Request, StepReport, StepStats
from overtone.errors import Cancelled, DeadlineExceeded, Draining, EngineError, OvertoneError, PromptTooLong, QueueFull

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 8

Runner = Callable[[StepPlan], torch.Tensor]
"""A step's plan -> logits (S + P, vocabulary): of the S chunks that complete, then of the P prompt tokens that
`logprobs.prompt_rows` names; any floating dtype."""


class Engine:
    """Continuous batching over `run`. `report` is called from the engine's thread, once after every step; `on_death` once
    if the engine cannot go on; `on_idle` when nothing is left to do."""

    def __init__(
        self,
        run: Runner,
        decode: Callable[[SequenceABC[int]], str],
        eos_token_ids: frozenset[int],
        config: EngineConfig,
        report: Callable[[StepReport], None],
        on_death: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._decode = decode
        self._config = config
        self._report = report
        self._on_death = on_death
        self._on_idle = on_idle
        self._failed_steps = 0
        self._scheduler = Scheduler(config)
        self._eos = eos_token_ids
        self._builder = EventBuilder(eos_token_ids)
        self._wake = threading.Condition()
        self._submitted: list[Request] = []  # these six under _wake
        self._dead: EngineError | None = None
        self._cancelled: dict[str, OvertoneError] = {}
        self._waiting = 0
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="overtone-engine", daemon=True)

    # -- for other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request. After a return its events end with one that is `last`.

        Raises `PromptTooLong` for one that could never fit, `QueueFull`, `Draining`, and `EngineError` once the engine is
        dead.
        """
        limit = self._config.max_context_tokens
        tokens = len(request.prompt_ids) + request.stopping.max_new_tokens
        if tokens > limit:
            raise PromptTooLong(f"{tokens} tokens exceed the context of {limit}", field="prompt")
        with self._wake:
            if self._dead is not None:
                raise self._dead
            if self._draining or self._stopping:
                raise Draining("the server is shutting down")
            if self._waiting >= self._config.max_queue:
                raise QueueFull(
                    f"{self._waiting} requests are waiting already (max_queue)",
                    retry_after_s=1.0,
                    metadata={"max_queue": str(self._config.max_queue)},
                )
            self._waiting += 1
            self._submitted.append(request)
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

    # -- the engine's thread

    def _loop(self) -> None:
        """The thread. Whatever escapes ends every request with an error, and the owner hears of it."""
        try:
            self._serve()
        except Exception:
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
                idle = not self._scheduler.running and not self._scheduler.waiting
                if idle and not self._submitted and not self._cancelled and not self._stopping:
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
        plan = self._scheduler.schedule()
        with self._wake:
            self._waiting = len(self._scheduler.waiting) + len(self._submitted)
        if plan is not None:
            self._mark_admitted(plan, started)
            try:
                logits = self._run(plan)
                self._postprocess(plan, logits, events)
                self._failed_steps = 0
            except Exception as error:
                log.exception("a step failed; its %d requests end with an error", len(plan.chunks))
                failure = error if isinstance(error, OvertoneError) else EngineError("the model failed on this batch")
                events += [self._end(c.sequence, failure) for c in plan.chunks if c.sequence in self._scheduler.running]
                self._failed_steps += 1
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
            except Exception:
                log.exception("a prompt was refused by the tokenizer")
                events.append(Event(request.request_id, error=EngineError("the tokenizer refused the prompt")))
                continue
            self._scheduler.add(Sequence(request, detokenizer))
        now = time.monotonic()
        for sequence in list(self._scheduler):
            request = sequence.request
            error = cancelled.get(request.request_id)
            if error is None and request.deadline is not None and now >= request.deadline:
                error = DeadlineExceeded("the request's deadline passed")
            if error is not None:
                events.append(self._end(sequence, error))
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
        for chunk in plan.chunks:
            chunk.sequence.computed += chunk.length
        for sequence, choice in zip(completed, sampled, strict=True):
            event = self._builder.advance(sequence, choice, time.monotonic())
            if event.last:
                self._scheduler.remove(sequence)
            events.append(event)

    def _end(self, sequence: Sequence, error: OvertoneError) -> Event:
        self._scheduler.remove(sequence)
        return Event(sequence.request.request_id, error=error)

    def _stats(self, plan: StepPlan | None = None, duration_s: float = 0.0) -> StepStats:
        chunks = plan.chunks if plan else ()
        return StepStats(
            duration_s=duration_s,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_used=self._scheduler.pages.used,
            pages_total=self._scheduler.pages.total,
            prefill_tokens=sum(c.length for c in plan.prefills) if plan else 0,
            decode_tokens=len(plan.decodes) if plan else 0,
            chunks=len(chunks),
            distinct_adapters=len({c.sequence.request.adapter_key for c in chunks} - {""}),
            preemptions=plan.preempted if plan else 0,
        )
