"""The scheduler's rules said plainly: lists that are searched whole, nothing kept that can be counted again. An oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

from overtone.engine.config import EngineConfig


@dataclass(eq=False)
class Page:
    """content: what it may be found by; None while it is its owner's alone. left: when its last user went. fresh: handed
    out for this step."""

    content: tuple | None = None
    left: int = -1
    fresh: bool = True


@dataclass(eq=False)
class Job:
    name: str
    priority: int
    tenant: str
    salt: str
    adapter: str | None
    """None: an adapter without a name, which must not share."""
    tokens: list[int]
    computed: int = 0
    pages: list[Page] = field(default_factory=list)
    admitted: int | None = None
    put_off: int | None = None
    charged: int = 0
    reached: int = 0
    cached: int = 0
    unsound: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def flow(self) -> str:
        return self.adapter or ""


class SlowScheduler:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.jobs: list[Job] = []  # alive, in order of arrival
        self.cached: list[Page] = []
        # (priority, tenant) and (priority, tenant, adapter), in order of activation; of those that left all is remembered
        # until nothing beside them is active.
        self.clocks: dict[tuple, float] = {}
        self.left: dict[tuple, float] = {}
        self.time = 0
        self.fresh = self.preempted = self.evicted = self.displaced = 0

    # -- who is where

    @property
    def running(self) -> list[Job]:
        return sorted((j for j in self.jobs if j.admitted is not None), key=lambda j: (-j.priority, j.admitted))

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.admitted is None]

    def users(self, page: Page) -> int:
        return sum(page in job.pages for job in self.jobs)

    @property
    def used(self) -> int:
        return len({page for job in self.jobs for page in job.pages})

    def room(self) -> int:
        return self.config.cache_pages - self.used

    def tick(self) -> int:
        self.time += 1
        return self.time

    # -- arrivals and departures

    def beside(self, times: dict[tuple, float], key: tuple) -> dict[tuple, float]:
        return {k: time for k, time in times.items() if len(k) == len(key) and k[:-1] == key[:-1]}

    def add(self, job: Job) -> None:
        for key in ((job.priority, job.tenant), (job.priority, job.tenant, job.flow)):
            least = min(self.beside(self.clocks, key).values(), default=0.0)
            self.clocks.setdefault(key, max(self.left.get(key, 0.0), least))
        self.jobs.append(job)

    def remove(self, job: Job) -> None:
        self.release(job)
        self.jobs.remove(job)
        active = {key for j in self.jobs for key in ((j.priority, j.tenant), (j.priority, j.tenant, j.flow))}
        self.left |= {key: time for key, time in self.clocks.items() if key not in active}
        self.clocks = {key: time for key, time in self.clocks.items() if key in active}
        self.left = {key: time for key, time in self.left.items() if self.beside(self.clocks, key)}

    def release(self, job: Job) -> None:
        for page in reversed(job.pages):
            page.left = self.tick()
        job.reached = max(job.reached, job.computed)
        job.pages, job.computed = [], 0

    # -- pages

    def content(self, job: Job, index: int) -> tuple | None:
        if job.adapter is None or not self.config.prefix_cache:
            return None
        return job.tenant, job.salt, job.adapter, tuple(job.tokens[: (index + 1) * self.config.page_tokens])

    def find(self, content: tuple | None) -> Page | None:
        return next((page for page in self.cached if content is not None and page.content == content), None)

    def matches(self, job: Job) -> list[Page]:
        size, found = self.config.page_tokens, []
        first = job.computed // size
        if first and job.pages[first - 1] not in self.cached:
            return []
        for index in range(first, (len(job.tokens) - 1) // size):
            page = self.find(self.content(job, index))
            if page is None:
                break
            found.append(page)
        return found

    def use(self, job: Job, found: list[Page]) -> None:
        size = self.config.page_tokens
        first = job.computed // size
        job.pages[first : first + len(found)] = found
        before = max(job.computed, job.reached)
        job.computed = (first + len(found)) * size
        job.cached += max(0, job.computed - before)

    def grow(self, job: Job) -> bool:
        missing = -(-len(job.tokens) // self.config.page_tokens) - len(job.pages)
        if missing > self.room():
            return False
        for _ in range(missing):
            self.fresh += 1
            if self.used + len([p for p in self.cached if not self.users(p)]) == self.config.cache_pages:
                oldest = min((p for p in self.cached if not self.users(p)), key=lambda p: p.left)
                self.cached.remove(oldest)
                self.evicted += 1
            job.pages.append(Page())
        return True

    def publish(self, job: Job) -> None:
        for index in range(job.computed // self.config.page_tokens):
            page = job.pages[index]
            if page in self.cached:
                continue
            content = self.content(job, index)
            # A page that was withdrawn still has its content, and is not found again.
            if content is None or page.content is not None or (index and job.pages[index - 1] not in self.cached):
                return
            known = self.find(content)
            if known is not None:
                job.pages[index] = known
            else:
                page.content = content
                self.cached.append(page)

    def withdraw(self, job: Job) -> None:
        first = job.pages[0]
        if first in self.cached:
            size = self.config.page_tokens
            root = (*first.content[:3], first.content[3][:size])
            self.cached = [p for p in self.cached if (*p.content[:3], p.content[3][:size]) != root]

    # -- a step

    def charge(self, job: Job) -> None:
        tokens = max(0, len(job.tokens) - max(job.charged, job.computed))
        job.charged = len(job.tokens)
        weight = self.config.tenant_weights.get(job.tenant, 1.0)
        self.clocks[job.priority, job.tenant] += tokens / weight
        self.clocks[job.priority, job.tenant, job.flow] += tokens

    def next(self) -> Job | None:
        if not self.waiting:
            return None
        top = max(job.priority for job in self.waiting)
        level = [job for job in self.waiting if job.priority == top]
        put_off = [job for job in level if job.put_off is not None]
        if put_off:
            return max(put_off, key=lambda job: job.put_off)
        order = list(self.clocks)

        def place(job: Job) -> tuple:
            tenant, flow = (top, job.tenant), (top, job.tenant, job.flow)
            return (
                self.clocks[tenant], order.index(tenant), self.clocks[flow], order.index(flow), self.jobs.index(job)
            )  # fmt: skip

        return min(level, key=place)

    def preempt(self, job: Job) -> None:
        self.fresh -= sum(page.fresh for page in job.pages)
        self.release(job)
        job.admitted, job.put_off = None, self.tick()
        self.preempted += 1

    def room_for(self, job: Job, stay: list[Job]) -> bool:
        """Whether it has a place and pages once only these run."""
        pages = {page for other in stay for page in other.pages} | set(self.matches(job))
        needed = -(-len(job.tokens) // self.config.page_tokens) - len(self.matches(job))
        return len(stay) < self.config.max_batch and len(pages) + needed <= self.config.cache_pages

    def admit(self) -> None:
        level = None
        while (job := self.next()) is not None:
            if self.preempted and job.priority != level:
                return
            level, running = job.priority, self.running
            # The fewest of the lower priorities, from the last on, without which there is room.
            worse = sum(other.priority < job.priority for other in running)
            stays = (running[: len(running) - n] for n in range(worse + 1))
            stay = next((stay for stay in stays if self.room_for(job, stay)), None)
            if stay is None:
                return
            for other in reversed(running[len(stay) :]):
                self.preempt(other)
                self.displaced += 1
            found = self.matches(job)
            job.admitted, job.put_off = self.tick(), None
            self.use(job, found)
            assert self.grow(job)
            self.charge(job)

    def step(self) -> tuple[list[str], list[tuple[str, int]]]:
        """Names that decode; (name, length) of prompt chunks."""
        self.fresh = self.preempted = 0
        for job in self.jobs:
            for page in job.pages:
                page.fresh = False
        for job in self.running:
            if job.pending > 1 and self.matches(job):
                self.use(job, self.matches(job))
        ready = [job for job in self.running if job.pending == 1]
        for job in ready:
            while job.admitted is not None and not self.grow(job):
                self.preempt(self.running[-1])
        decodes = [job for job in ready if job.admitted is not None]
        for job in decodes:
            self.charge(job)
        if not self.preempted:
            self.admit()
            decodes = [job for job in decodes if job.admitted is not None]
        chunks = self.chunks([job for job in self.running if job not in decodes], len(decodes))
        return [job.name for job in decodes], chunks

    def chunks(self, prompts: list[Job], spent: int) -> list[tuple[str, int]]:
        """Token by token."""
        budget = self.config.max_step_tokens - spent
        given = dict.fromkeys(prompts, 0)
        first_share = max(1, budget // 2)
        while budget > 0 and any(given[job] < job.pending for job in prompts):
            if first_share and given[prompts[0]] < prompts[0].pending:
                chosen = prompts[0]
                first_share -= 1
            else:
                first_share = 0
                open_ones = [job for job in prompts if given[job] < job.pending]
                chosen = min(open_ones, key=lambda job: (-job.priority, job.pending - given[job]))
            given[chosen] += 1
            budget -= 1
        return [(job.name, length) for job, length in given.items() if length]
