"""What runs in the next step: continuous batching with chunked prefill and preemption by recomputation. Torch-free.

Decoding sequences go first, one token each; the rest of the step's token budget is shared by the prompts under way. Who is
admitted next is for priority first (strictly) and for a fair queue within one priority. When pages run out, or when one of
a higher priority finds no place or no pages, the running sequence of the lowest priority that was admitted last gives its
own up and starts again later from its tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from overtone.engine.config import EngineConfig
from overtone.engine.fair import FairQueue
from overtone.engine.pages import PageAllocator
from overtone.engine.prefix import CachedPage, PrefixCache
from overtone.engine.queue_limits import QueueLoad
from overtone.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a sequence from its `computed`-th on."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """Whether the model's answer to the last of these tokens is the sequence's next token."""
        return self.length == self.sequence.pending


@dataclass(frozen=True, slots=True)
class StepPlan:
    """decodes: chunks of one token that complete; prefills: the others, and those of sequences admitted in this step;
    fresh_pages: pages handed out for this step, whose former contents must go (pages found in the prefix cache are not
    among them)."""

    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]
    fresh_pages: tuple[int, ...]
    preempted: int

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decodes + self.prefills


class Scheduler:
    """Owns the queue and the pages. All methods are called by the engine's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.pages = PrefixCache(
            PageAllocator(config.cache_pages, config.page_tokens),
            enabled=config.prefix_cache,
            prompts_only=config.deterministic,
        )
        self.running: list[Sequence] = []  # highest priority first, then in order of admission
        self.load = QueueLoad()
        self._queues: dict[int, FairQueue] = {}  # by priority; only those with something queued or running
        self._admissions = itertools.count()
        self._fresh: list[int] = []
        self._preempted = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        for queue in self._queues.values():
            yield from queue

    @property
    def flows(self) -> int:
        """Adapters of tenants that something is known of: those with something queued or running."""
        return sum(queue.flows for queue in self._queues.values())

    def add(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault(sequence.request.priority, FairQueue(self._config.tenant_weights))
        queue.add(sequence)
        self.load.count(sequence.request)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and lets go of its pages."""
        queue = self._queue(sequence)
        if sequence.rank is None:
            queue.take(sequence)
            self.load.count(sequence.request, -1)
        else:
            self.running.remove(sequence)
            sequence.rank = None
        self.pages.release(sequence)
        queue.leave(sequence)
        if not queue.flows:
            del self._queues[sequence.request.priority]

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to do."""
        self._fresh, self._preempted = [], 0
        for sequence in self.running:
            # Another request may have published meanwhile what this one would compute next.
            if sequence.pending > 1 and (found := self.pages.match(sequence)):
                self.pages.use(sequence, found)
        decodes = self._schedule_decodes()
        if not self._preempted:
            self._admit()
            decodes = [sequence for sequence in decodes if sequence.rank is not None]
        decoding = set(decodes)
        prompts = [sequence for sequence in self.running if sequence not in decoding]
        prefills = _share(prompts, self._config.max_step_tokens - len(decodes))
        if not decodes and not prefills:
            return None
        return StepPlan(tuple(Chunk(s, 1) for s in decodes), prefills, tuple(self._fresh), self._preempted)

    def look_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, which is under way, before the tokens that it chooses are known: of the sequences that its
        tokens cannot be the last of. None if it cannot be said: there are others, or no pages without preempting."""
        sequences = [chunk.sequence for chunk in plan.decodes if chunk.sequence.rank is not None]
        if plan.prefills or set(sequences) != set(self.running) or self._may_admit:
            return None
        going_on = [s for s in sequences if len(s.output_ids) + 1 < s.request.stopping.max_new_tokens]
        missing = [self._missing(sequence, ahead=1) for sequence in going_on]
        if not going_on or not self.pages.can_allocate(sum(missing)):
            return None
        fresh: list[int] = []
        for sequence, count in zip(going_on, missing, strict=True):
            pages = self.pages.allocate(count)
            sequence.pages += pages
            fresh += pages
            self._charge(sequence, ahead=1)
        return StepPlan(tuple(Chunk(sequence, 1) for sequence in going_on), (), tuple(fresh), 0)

    def advance(self, chunk: Chunk, *, sound: bool) -> None:
        """The step has computed this chunk. sound: as far as one can see without NaN, so that others may use its pages."""
        chunk.sequence.computed += chunk.length
        if sound:
            self.pages.publish(chunk.sequence)

    def _schedule_decodes(self) -> list[Sequence]:
        ready = [s for s in self.running if s.pending == 1]
        for sequence in ready:
            while sequence.rank is not None and not self._grow(sequence):
                self._preempt(self.running[-1])
        decodes = [s for s in ready if s.rank is not None]
        for sequence in decodes:
            self._charge(sequence)
        return decodes

    def _admit(self) -> None:
        """Who finds no room for all its tokens holds up whoever comes after it: else long prompts would starve. Who was
        preempted for another waits for the next step at least."""
        for priority in sorted(self._queues, reverse=True):
            queue = self._queues[priority]
            while (sequence := queue.first()) is not None:
                if self._full and not self._below(priority):
                    return
                found = self.pages.match(sequence)
                if not self._make_room(sequence, found):
                    return
                queue.take(sequence)
                self.load.count(sequence.request, -1)
                if not sequence.charged:
                    self.pages.count_query(sequence)
                self._start(sequence, found)
            if self._preempted:
                return

    def _make_room(self, sequence: Sequence, found: list[CachedPage]) -> bool:
        """Whether there is a place, and pages for all its tokens; if need be by preempting lower priorities, one after the
        other and only if that helps."""
        if not self._full and self.pages.fits(sequence, found):
            return True
        below = self._below(sequence.request.priority)
        staying = self.running[: len(self.running) - below]
        if not below or not self.pages.fits_beside(sequence, found, staying):
            return False
        while self._full or not self.pages.fits(sequence, found):
            self._preempt(self.running[-1])
        return True

    @property
    def _may_admit(self) -> bool:
        """Whether somebody waits whom the next `schedule` might admit."""
        waiting = [priority for priority, queue in self._queues.items() if queue.first() is not None]
        return bool(waiting) and not (self._full and not self._below(max(waiting)))

    @property
    def _full(self) -> bool:
        return len(self.running) >= self._config.max_batch

    def _below(self, priority: int) -> int:
        """How many running sequences have a lower priority: the last ones."""
        return len(self.running) - bisect.bisect_right(self.running, -priority, key=_negative_priority)

    def _start(self, sequence: Sequence, found: list[CachedPage]) -> None:
        sequence.rank = (-sequence.request.priority, next(self._admissions))
        bisect.insort(self.running, sequence, key=lambda each: each.rank or ())
        self.pages.use(sequence, found)
        self._grow(sequence)
        self._charge(sequence)

    def _grow(self, sequence: Sequence) -> bool:
        """Gives `sequence` the pages for all its tokens, or none."""
        missing = self._missing(sequence)
        if not self.pages.can_allocate(missing):
            return False
        pages = self.pages.allocate(missing)
        sequence.pages += pages
        self._fresh += pages
        return True

    def _missing(self, sequence: Sequence, ahead: int = 0) -> int:
        """Pages that it has not yet, for all its tokens. ahead: tokens not known yet."""
        return max(0, self.pages.pages_for(sequence.num_tokens + ahead) - len(sequence.pages))

    def _charge(self, sequence: Sequence, ahead: int = 0) -> None:
        """For its tokens that are new: neither charged before nor found in the cache. ahead: tokens not known yet."""
        tokens = sequence.num_tokens + ahead
        new = tokens - max(sequence.charged, sequence.computed)
        sequence.charged = tokens
        self._queue(sequence).charge(sequence, max(0, new))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.rank = None
        # It may have got a page for this very step.
        self._fresh = [page for page in self._fresh if page not in sequence.pages]
        self.pages.release(sequence)
        self._queue(sequence).put_back(sequence)
        self.load.count(sequence.request)
        self._preempted += 1

    def _queue(self, sequence: Sequence) -> FairQueue:
        return self._queues[sequence.request.priority]


def _negative_priority(sequence: Sequence) -> int:
    return -sequence.request.priority


def _share(prompts: list[Sequence], budget: int) -> tuple[Chunk, ...]:
    """The first prompt gets up to half, so that everyone's turn comes; the rest goes to the highest priority and there to
    what is nearest to its end, so that a short prompt never waits for all of a long one."""
    if not prompts:
        return ()
    lengths = dict.fromkeys(prompts, 0)
    lengths[prompts[0]] = min(prompts[0].pending, max(1, budget // 2))
    budget -= lengths[prompts[0]]
    for sequence in sorted(prompts, key=lambda s: (-s.request.priority, s.pending - lengths[s])):
        more = min(sequence.pending - lengths[sequence], budget)
        lengths[sequence] += more
        budget -= more
    return tuple(Chunk(sequence, length) for sequence, length in lengths.items() if length)
