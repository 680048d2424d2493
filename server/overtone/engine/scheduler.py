"""What runs in the next step: continuous batching with chunked prefill and preemption by recomputation. Torch-free.

Decoding sequences go first, one token each; the rest of the step's token budget goes to prompts, in order of arrival. When
pages run out, the sequence admitted last gives its own up and starts again later from its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from overtone.engine.config import EngineConfig
from overtone.engine.pages import PageAllocator
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
    """decodes: chunks of one token that complete; prefills: the others; fresh_pages: pages handed out for this step."""

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
        self.pages = PageAllocator(config.cache_pages, config.page_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._fresh: list[int] = []
        self._preempted = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to do."""
        self._fresh, self._preempted = [], 0
        decodes = self._schedule_decodes()
        budget = self._config.max_step_tokens - len(decodes)
        prefills: list[Chunk] = []
        for sequence in self.running:
            if sequence.pending > 1 or sequence.computed == 0:
                budget -= self._add_chunk(sequence, budget, prefills)
        while self.waiting and budget > 0 and len(self.running) < self._config.max_batch:
            if not self._grow(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._add_chunk(self.running[-1], budget, prefills)
        if not decodes and not prefills:
            return None
        return StepPlan(tuple(decodes), tuple(prefills), tuple(self._fresh), self._preempted)

    def _schedule_decodes(self) -> list[Chunk]:
        ready = [s for s in self.running if s.pending == 1 and s.computed > 0]
        for sequence in ready:
            while sequence in self.running and not self._grow(sequence):
                self._preempt(self.running[-1])
        return [Chunk(s, 1) for s in ready if s in self.running]

    @staticmethod
    def _add_chunk(sequence: Sequence, budget: int, prefills: list[Chunk]) -> int:
        length = min(sequence.pending, budget)
        if length > 0:
            prefills.append(Chunk(sequence, length))
        return length

    def _grow(self, sequence: Sequence) -> bool:
        """Gives `sequence` the pages for all its tokens, or none."""
        missing = self.pages.pages_for(sequence.num_tokens) - len(sequence.pages)
        if not self.pages.can_allocate(missing):
            return False
        pages = self.pages.allocate(max(0, missing))
        sequence.pages += pages
        self._fresh += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self._preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
