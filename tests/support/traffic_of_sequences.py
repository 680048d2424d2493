"""Plays the engine to a scheduler and to its oracle at once, and checks everything after each step."""

from __future__ import annotations

from overtone.engine.config import EngineConfig
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.engine.sequence import Sequence
from support.requests import make_sequence
from support.slow_scheduler import Job, SlowScheduler


class SequenceTraffic:
    """Every sequence says token 7 until its length; the cache's memory is modelled slot by slot: what a slot holds is named
    by everything that a key and a value depend on."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.scheduler, self.slow = Scheduler(config), SlowScheduler(config)
        self.alive: dict[Sequence, Job] = {}
        self.memory: dict[tuple[int, int], tuple] = {}
        self.arrived = self.preemptions = self.hit_tokens = self.query_tokens = self.evictions = self.steps = 0
        self.served: dict[tuple[str, str], int] = {}

    def add(
        self,
        prompt: list[int],
        new: int,
        *,
        tenant: str = "",
        adapter: str | None = "",
        priority: int = 0,
        salt: str = "",
    ) -> Sequence:
        name = f"s{self.arrived}"
        self.arrived += 1
        sequence = make_sequence(
            name, prompt, new, tenant=tenant, priority=priority, cache_salt=salt,
            adapter={} if adapter is None else None, adapter_key=adapter or "",
        )  # fmt: skip
        self.alive[sequence] = job = Job(name, priority, tenant, salt, adapter, list(prompt))
        self.scheduler.add(sequence)
        self.slow.add(job)
        return sequence

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        job = self.alive.pop(sequence)
        assert sequence.cached_tokens == job.cached
        assert sequence.pages == []
        self.slow.remove(job)

    def step(self, *, unsound: bool = False) -> bool:
        """One step of both, compared. unsound: the first sequence that completes turns out to have been full of NaN."""
        plan = self.scheduler.schedule()
        decodes, chunks = self.slow.step()
        assert [c.sequence.request.request_id for c in plan.decodes if plan] == decodes if plan else not decodes
        assert [(c.sequence.request.request_id, c.length) for c in plan.prefills] == chunks if plan else not chunks
        self.check_state()
        if plan is None:
            assert not self.alive, "work is there, and nothing of it is scheduled"
            return False
        self.steps += 1
        assert plan.preempted == self.slow.preempted
        assert len(plan.fresh_pages) == len(set(plan.fresh_pages)) == self.slow.fresh
        assert sum(chunk.length for chunk in plan.chunks) <= self.config.max_step_tokens
        assert len(plan.chunks) <= len(self.scheduler.running) <= self.config.max_batch
        self.preemptions += plan.preempted
        self.compute(plan)
        self.finish(plan, unsound)
        self.check_state()
        return True

    def compute(self, plan: StepPlan) -> None:
        size = self.config.page_tokens
        for page in plan.fresh_pages:
            for offset in range(size):
                self.memory.pop((page, offset), None)
        for chunk in plan.chunks:
            s = chunk.sequence
            for position in range(s.computed, s.computed + chunk.length):
                slot = (s.pages[position // size], position % size)
                assert slot not in self.memory, "a page that others may read is written, or was not announced as fresh"
                self.memory[slot] = self.meaning(s, position)
        for chunk in plan.chunks:
            s = chunk.sequence
            for position in range(s.computed + chunk.length):
                assert self.memory[s.pages[position // size], position % size] == self.meaning(s, position)
            flow = (s.request.tenant, s.request.adapter_key)
            self.served[flow] = self.served.get(flow, 0) + chunk.length

    def meaning(self, s: Sequence, position: int) -> tuple:
        whose = s.request.request_id if self.alive[s].adapter is None or not self.config.prefix_cache else ""
        r = s.request
        return whose, r.tenant, r.cache_salt, r.adapter_key, tuple(s.token_slice(0, position + 1))

    def finish(self, plan: StepPlan, unsound: bool) -> None:
        completed = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        bad = completed[0] if unsound and completed else None
        if bad is not None:
            self.scheduler.pages.withdraw(bad)
            self.slow.withdraw(self.alive[bad])
        for chunk in plan.chunks:
            self.scheduler.advance(chunk, sound=chunk.sequence is not bad)
            job = self.alive[chunk.sequence]
            job.computed += chunk.length
            if chunk.sequence is not bad:
                self.slow.publish(job)
        for sequence in completed:
            sequence.output_ids.append(7)
            self.alive[sequence].tokens.append(7)
            if sequence is bad or len(sequence.output_ids) == sequence.request.stopping.max_new_tokens:
                self.end(sequence)

    def check_state(self) -> None:
        scheduler, slow = self.scheduler, self.slow
        assert [s.request.request_id for s in scheduler.running] == [job.name for job in slow.running]
        assert {s.request.request_id for s in scheduler} == {job.name for job in slow.jobs}
        assert scheduler.load.requests == len(slow.waiting)
        waiting = [s for s in self.alive if s not in scheduler.running]
        assert scheduler.load.tokens == sum(s.request.max_tokens for s in waiting)
        assert all(s.pages == [] and s.computed == 0 for s in waiting)
        assert all(s.computed == self.alive[s].computed for s in scheduler.running)
        assert scheduler.flows == sum(len(key) == 3 for key in slow.clocks)
        assert (scheduler.pages.used, scheduler.pages.cached) == (slow.used, len(slow.cached))
        self.check_pages()
        counts = scheduler.pages.take_counts()
        self.query_tokens += counts.query_tokens
        self.hit_tokens += counts.hit_tokens
        self.evictions += counts.evictions
        assert self.evictions == slow.evicted

    def check_pages(self) -> None:
        """The same pages are shared as in the oracle, page by page; none has two owners otherwise."""
        number: dict[object, int] = {}
        for s in self.scheduler.running:
            assert len(s.pages) == len(self.alive[s].pages) == len(set(s.pages))
            for page, model in zip(s.pages, self.alive[s].pages, strict=True):
                assert 1 <= page <= self.config.cache_pages
                assert number.setdefault(model, page) == page
        assert len(set(number.values())) == len(number)

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"{len(self.alive)} sequences never finish")
