"""The scheduler under random traffic with tiny caches: invariants after every step, and an independent replay."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from overtone.engine.config import EngineConfig
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.engine.sequence import Sequence
from support.requests import make_sequence

SEEDS = range(60)


def random_config(rng: random.Random) -> EngineConfig:
    page_tokens = rng.choice([1, 2, 4])
    context = rng.randint(4, 24)
    pages = -(-context // page_tokens) + rng.choice([0, 0, 1, 3, 10])
    batch = rng.randint(1, 6)
    return EngineConfig(batch, batch + rng.choice([0, 1, 5, 30]), context, page_tokens, pages, max_queue=100)


@dataclass
class Replay:
    """What the scheduler should do, from counts alone. A job: [name, tokens, computed, pages]."""

    config: EngineConfig
    running: list[list] = field(default_factory=list)
    waiting: list[list] = field(default_factory=list)

    def pages_needed(self, job: list) -> int:
        return max(0, -(-job[1] // self.config.page_tokens) - job[3])

    def grow(self, job: list) -> bool:
        need = self.pages_needed(job)
        if need > self.config.cache_pages - sum(other[3] for other in self.running):
            return False
        job[3] += need
        return True

    def step(self) -> tuple[list[str], list[tuple[str, int]], int]:
        """Names that decode, (name, length) of prompt chunks, preemptions."""
        decodes: list[list] = []
        preempted = 0
        for job in [job for job in self.running if job[2] == job[1] - 1 > 0]:
            while job in self.running and not self.grow(job):
                victim = self.running.pop()
                victim[2:] = [0, 0]
                self.waiting.insert(0, victim)
                preempted += 1
            if job in self.running:
                decodes.append(job)
        budget = self.config.max_step_tokens - len(decodes)
        chunks = []
        unfinished = [job for job in self.running if job[2] < job[1] and job not in decodes]
        while budget > 0:
            if not unfinished:
                if not self.waiting or len(self.running) == self.config.max_batch or not self.grow(self.waiting[0]):
                    break
                unfinished.append(self.waiting.pop(0))
                self.running.append(unfinished[0])
            job = unfinished.pop(0)
            length = min(budget, job[1] - job[2])
            chunks.append((job[0], length))
            budget -= length
        return [job[0] for job in decodes], chunks, preempted


class Traffic:
    """Plays the engine: adds sequences, runs plans, ends sequences; checks everything after each step."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.config = random_config(self.rng)
        self.scheduler = Scheduler(self.config)
        self.replay = Replay(self.config)
        self.arrived: list[Sequence] = []
        self.ended: set[Sequence] = set()
        self.admitted: list[Sequence] = []
        self.preemptions = 0
        self.split_prompts = 0

    def add(self) -> None:
        context = self.config.max_context_tokens
        prompt = self.rng.randint(1, context - 1)
        new = self.rng.randint(1, context - prompt)
        name = f"s{len(self.arrived)}"
        sequence = make_sequence(name, range(prompt), max_new_tokens=new)
        self.arrived.append(sequence)
        self.scheduler.add(sequence)
        self.replay.waiting.append([name, prompt, 0, 0])

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        assert sequence.pages == []
        self.ended.add(sequence)
        name = sequence.request.request_id
        self.replay.running = [job for job in self.replay.running if job[0] != name]
        self.replay.waiting = [job for job in self.replay.waiting if job[0] != name]

    def step(self) -> StepPlan | None:
        before = {(page, s) for s in self.scheduler for page in s.pages}
        was_running = list(self.scheduler.running)
        computed = {s: s.computed for s in was_running}
        plan = self.scheduler.schedule()
        decodes, chunks, preempted = self.replay.step()
        if plan is None:
            assert not decodes
            assert not chunks
            return None
        assert [c.sequence.request.request_id for c in plan.decodes] == decodes
        assert [(c.sequence.request.request_id, c.length) for c in plan.prefills] == chunks
        assert plan.preempted == preempted
        self.check_plan(plan)
        self.check_pages(plan, before)
        out = [s for s in was_running if s not in self.scheduler.running]
        assert len(out) == plan.preempted
        assert all(s.computed == 0 and s.pages == [] for s in out), "a preempted sequence starts again from its tokens"
        assert all(s.computed == computed[s] for s in was_running if s not in out)
        self.preemptions += plan.preempted
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        sequences = [chunk.sequence for chunk in plan.chunks]
        assert len(set(sequences)) == len(sequences)
        assert all(chunk.length >= 1 for chunk in plan.chunks)
        assert sum(chunk.length for chunk in plan.chunks) <= self.config.max_step_tokens
        assert len(sequences) <= len(self.scheduler.running) <= self.config.max_batch
        # Decodes first: every sequence that can decode does, one token each, whatever prompts wait.
        can_decode = [s for s in self.scheduler.running if s.pending == 1 and s.computed > 0]
        assert [chunk.sequence for chunk in plan.decodes] == can_decode
        assert all(chunk.length == 1 and chunk.completes for chunk in plan.decodes)
        # First come, first served, through preemption too.
        in_order = [s for s in self.arrived if s not in self.ended]
        assert list(self.scheduler) == in_order
        for sequence in self.scheduler.running:
            if sequence not in self.admitted:
                self.admitted.append(sequence)
        self.split_prompts += sum(not chunk.completes for chunk in plan.prefills)

    def check_pages(self, plan: StepPlan, before: set[tuple[int, Sequence]]) -> None:
        owned = [(page, s) for s in self.scheduler.running for page in s.pages]
        pages = [page for page, _ in owned]
        assert len(set(pages)) == len(pages), "a page has two owners"
        assert all(1 <= page <= self.config.cache_pages for page in pages)
        assert self.scheduler.pages.used == len(pages)
        for chunk in plan.chunks:
            needed = chunk.sequence.computed + chunk.length
            assert len(chunk.sequence.pages) * self.config.page_tokens >= needed
        assert all(s.pages == [] and s.computed == 0 for s in self.scheduler.waiting)
        assert sorted(plan.fresh_pages) == sorted(page for page, s in owned if (page, s) not in before)

    def postprocess(self, plan: StepPlan) -> None:
        completed = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        jobs = {job[0]: job for job in self.replay.running}
        for chunk in plan.chunks:
            chunk.sequence.computed += chunk.length
            jobs[chunk.sequence.request.request_id][2] += chunk.length
        for sequence in completed:
            sequence.output_ids.append(7)
            jobs[sequence.request.request_id][1] += 1
            if len(sequence.output_ids) == sequence.request.stopping.max_new_tokens:
                self.end(sequence)


def play(seed: int, *, requests: int = 25, cancel: float = 0.0) -> Traffic:
    traffic = Traffic(seed)
    rng = traffic.rng
    idle = 0
    for _ in range(3000):
        while len(traffic.arrived) < requests and rng.random() < 0.4:
            traffic.add()
        alive = list(traffic.scheduler)
        if alive and rng.random() < cancel:
            traffic.end(rng.choice(alive))
        if len(traffic.ended) == requests:
            return traffic
        plan = traffic.step()
        if plan is not None:
            traffic.postprocess(plan)
        idle = idle + 1 if plan is None and list(traffic.scheduler) else 0
        assert not idle, "work is there, and nothing of it is scheduled"
    raise AssertionError(f"{requests - len(traffic.ended)} sequences never finished")


@pytest.mark.parametrize("seed", SEEDS)
def test_everyone_finishes(seed: int) -> None:
    traffic = play(seed)
    assert all(len(s.output_ids) == s.request.stopping.max_new_tokens for s in traffic.arrived)
    assert traffic.admitted == traffic.arrived
    assert traffic.scheduler.pages.used == 0
    assert traffic.scheduler.schedule() is None


@pytest.mark.parametrize("seed", SEEDS)
def test_with_cancellations(seed: int) -> None:
    traffic = play(seed, cancel=0.1)
    assert traffic.scheduler.pages.used == 0


def test_the_traffic_is_hard_enough() -> None:
    """Preemption and split prompts do occur above, often."""
    played = [play(seed) for seed in SEEDS]
    assert sum(traffic.preemptions > 0 for traffic in played) > len(SEEDS) // 4
    assert sum(traffic.split_prompts > 0 for traffic in played) > len(SEEDS) // 4


def test_a_failed_step_leaves_no_fresh_pages_behind() -> None:
    """The engine removes the sequences of a failed step; the pages come back fresh for their next owners."""
    scheduler = Scheduler(EngineConfig(4, 16, 8, page_tokens=2, cache_pages=4))
    first, second = make_sequence("a", range(8)), make_sequence("b", range(6))
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.fresh_pages) == 4
    scheduler.remove(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    assert sorted(plan.fresh_pages) == sorted(second.pages)
    assert len(second.pages) == 3
