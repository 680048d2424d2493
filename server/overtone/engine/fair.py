"""Who is next: a weighted fair queue over tenants and, within a tenant, over adapters. Torch-free.

Every flow (a tenant; an adapter of a tenant) has a virtual time: the tokens that it was served, a tenant's divided by its
weight. The flow that is furthest behind goes first. A flow that becomes active starts at

    max(its virtual time when it left, the least virtual time of the active ones)

so neither idleness earns credit nor does a flow that leaves after every request escape what it owes; while no other is
active nobody is owed, and all start at 0 again. This is the virtual token counter of Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024, in two levels. The least virtual time never falls, so one that has left is forgotten once
it is not above it: the maximum is then the same without it.

Of two flows that always have something waiting, with B requests running at most and C tokens in the longest context, the
virtual times of two tenants of weights u and v never differ by more than B C / min(u, v), and those of two adapters of one
tenant by more than B C: a flow is admitted only when it is behind, and then gets at most what its running requests take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from overtone.engine.sequence import Sequence

_SWEEP = 64
_REMEMBERED = 10_000


class _Left:
    """Virtual times of those that have left while others stayed active. Bounded: a sweep forgets those that are not above
    the least active time, and of more than `_REMEMBERED` those that owe the least."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._next_sweep = _SWEEP

    def __len__(self) -> int:
        return len(self._times)

    def start(self, name: str, active: Collection[float]) -> float:
        """Where one that becomes active starts beside the `active` ones."""
        least = min(active, default=0.0)
        return max(self._times.pop(name, least), least)

    def keep(self, name: str, time: float, active: Collection[float]) -> None:
        """It has left the `active` ones behind."""
        if not active:
            self._times.clear()
            return
        self._times[name] = time
        if len(self._times) >= self._next_sweep:
            least = min(active)
            owing = sorted((item for item in self._times.items() if item[1] > least), key=lambda item: -item[1])
            self._times = dict(owing[:_REMEMBERED])
            # Each sweep is paid for by as many departures as it leaves entries.
            self._next_sweep = _SWEEP + 2 * len(self._times)


@dataclass(slots=True)
class _Flow:
    """The requests of one adapter of one tenant."""

    time: float
    members: int = 0  # queued or running
    queue: dict[Sequence, None] = field(default_factory=dict)  # in order of arrival


@dataclass(slots=True)
class _Tenant:
    time: float
    weight: float
    waiting: int = 0
    flows: dict[str, _Flow] = field(default_factory=dict)
    left: _Left = field(default_factory=_Left)

    @property
    def times(self) -> list[float]:
        return [flow.time for flow in self.flows.values()]


class FairQueue:
    """The waiting requests of one priority, and the virtual times of all its requests, running ones included.

    A sequence is added, taken when it is admitted, put back when it is preempted, and leaves once, from wherever it is.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._tenants: dict[str, _Tenant] = {}
        self._left = _Left()
        self._preempted: deque[Sequence] = deque()

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order that matters."""
        yield from self._preempted
        for tenant in self._tenants.values():
            for flow in tenant.flows.values():
                yield from flow.queue

    @property
    def flows(self) -> int:
        """Flows with something queued or running; 0: this queue may be forgotten."""
        return sum(len(tenant.flows) for tenant in self._tenants.values())

    @property
    def remembered(self) -> int:
        """Tenants, and adapters of active tenants, that have left owing."""
        return len(self._left) + sum(len(tenant.left) for tenant in self._tenants.values())

    @property
    def _times(self) -> list[float]:
        return [tenant.time for tenant in self._tenants.values()]

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            start = self._left.start(request.tenant, self._times)
            tenant = self._tenants[request.tenant] = _Tenant(start, self._weights.get(request.tenant, 1.0))
        flow = tenant.flows.get(request.adapter_key)
        if flow is None:
            start = tenant.left.start(request.adapter_key, tenant.times)
            flow = tenant.flows[request.adapter_key] = _Flow(start)
        flow.members += 1
        flow.queue[sequence] = None
        tenant.waiting += 1

    def first(self) -> Sequence | None:
        """The next to admit: what was preempted (its turn has come already), then the head of the flow that is furthest
        behind; among equals the one that became active first."""
        if self._preempted:
            return self._preempted[0]
        tenants = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if not tenants:
            return None
        flows = min(tenants, key=lambda tenant: tenant.time).flows.values()
        return next(iter(min((flow for flow in flows if flow.queue), key=lambda flow: flow.time).queue))

    def take(self, sequence: Sequence) -> None:
        """It waits no more."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        tenant, flow = self._find(sequence)
        del flow.queue[sequence]
        tenant.waiting -= 1

    def put_back(self, sequence: Sequence) -> None:
        """It was preempted and goes before all others. Of several the one admitted last is put back first."""
        self._preempted.appendleft(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It has ended; it does not wait."""
        tenant, flow = self._find(sequence)
        flow.members -= 1
        if not flow.members:
            del tenant.flows[sequence.request.adapter_key]
            tenant.left.keep(sequence.request.adapter_key, flow.time, tenant.times)
        if not tenant.flows:
            del self._tenants[sequence.request.tenant]
            self._left.keep(sequence.request.tenant, tenant.time, self._times)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Tokens were served to it."""
        tenant, flow = self._find(sequence)
        tenant.time += tokens / tenant.weight
        flow.time += tokens

    def _find(self, sequence: Sequence) -> tuple[_Tenant, _Flow]:
        tenant = self._tenants[sequence.request.tenant]
        return tenant, tenant.flows[sequence.request.adapter_key]
