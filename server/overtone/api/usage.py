"""What is counted of a request, and what is kept and told of an adapter."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import add
from typing import NamedTuple, Self

from overtone.api import latency
from overtone.api.latency import Latency, Quantiles
from overtone.engine.types import Event

OUTCOMES = ("length", "eos", "stop", "cancelled", "deadline_exceeded", "error")
"""How a request may end."""
_ERRORS = ("deadline_exceeded", "error")


def outcome_of(event: Event) -> str:
    """One of `OUTCOMES`, of a request's last event."""
    if event.finish is not None:
        return event.finish.reason.value
    reason = event.error.reason.lower() if event.error is not None else ""
    return reason if reason in OUTCOMES else "error"


@dataclass(slots=True)
class Measured:
    """A generation as far as it has come. Times are `time.monotonic()` seconds; latencies: `latency.key_of` -> count."""

    arrival: float
    prompt_tokens: int
    generated_tokens: int = 0
    last_token: float | None = None
    latencies: dict[int, int] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """Whether it has tokens."""
        return self.last_token is not None

    def tokens(self, count: int, now: float) -> float:
        """New tokens have come. Returns the seconds since those before, or since the arrival if they are the first."""
        before, kind = self.last_token, Latency.INTER_TOKEN
        if before is None:
            before, kind = self.arrival, Latency.FIRST_TOKEN
        self._count(kind, now - before)
        self.generated_tokens += count
        self.last_token = now
        return now - before

    def ended(self, total_s: float) -> None:
        self._count(Latency.TOTAL, total_s)

    def _count(self, kind: Latency, seconds: float) -> None:
        key = latency.key_of(kind, seconds)
        self.latencies[key] = self.latencies.get(key, 0) + 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What was counted of an adapter since its first use; a request counts when it ends. outcomes: by `OUTCOMES`."""

    adapter_id: str
    outcomes: Mapping[str, int]
    prompt_tokens: int
    generated_tokens: int
    first_use: datetime | None
    last_use: datetime | None
    first_token: Quantiles
    inter_token: Quantiles
    total: Quantiles

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def errors(self) -> int:
        return sum(self.outcomes[name] for name in _ERRORS)


class Head(NamedTuple):
    """A tally but for its latencies. Uses: Unix seconds, 0 for none; mark: tells it from others of the same id; then
    requests by `OUTCOMES`, tokens, and the buckets of the 99th percentiles."""

    first_use: float = 0.0
    last_use: float = 0.0
    mark: int = 0
    length: int = 0
    eos: int = 0
    stop: int = 0
    cancelled: int = 0
    deadline_exceeded: int = 0
    error: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_p99: int = 0
    inter_token_p99: int = 0
    total_p99: int = 0

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(zip(OUTCOMES, self[3:9], strict=True))

    @property
    def requests(self) -> int:
        return sum(self[3:9])

    @property
    def errors(self) -> int:
        return self.deadline_exceeded + self.error


_HEAD = struct.Struct("<2d9q3B")


@dataclass(slots=True)
class Tally:
    """A `Usage` while it grows: 91 bytes and ten for each bucket of latencies when it is packed."""

    head: Head = field(default_factory=Head)
    latencies: dict[int, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        for key, count in other.latencies.items():
            self.latencies[key] = self.latencies.get(key, 0) + count
        mine, more = self.head, other.head
        first_use = min(mine.first_use or more.first_use, more.first_use)
        counts = map(add, mine[3:11], more[3:11])
        p99s = latency.buckets(self.latencies, 99)
        self.head = Head(first_use, max(mine.last_use, more.last_use), mine.mark, *counts, *p99s)

    def pack(self) -> bytes:
        return _HEAD.pack(*self.head) + latency.pack(self.latencies)

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        return cls(head_of(packed), latency.unpack(packed[_HEAD.size :]))

    def usage(self, adapter_id: str) -> Usage:
        first, last = (datetime.fromtimestamp(t, UTC) if t else None for t in self.head[:2])
        quantiles = (latency.quantiles(self.latencies, kind) for kind in Latency)
        head = self.head
        return Usage(adapter_id, head.outcomes, head.prompt_tokens, head.generated_tokens, first, last, *quantiles)


def head_of(packed: bytes) -> Head:
    return Head._make(_HEAD.unpack_from(packed))


def used(packed: bytes, now: float) -> bytes:
    """The same, used now."""
    return _HEAD.pack(*head_of(packed)._replace(last_use=now)) + packed[_HEAD.size :]


def tally_of(measured: Measured, outcome: str, now: float) -> Tally:
    """One request that has ended."""
    tokens = {"prompt_tokens": measured.prompt_tokens, "generated_tokens": measured.generated_tokens}
    return Tally(Head(now, now, **tokens, **{outcome: 1}), measured.latencies)


ORDERS: Mapping[str, Callable[[Head], float]] = {
    "request_count": lambda head: head.requests,
    "error_count": lambda head: head.errors,
    "prompt_token_count": lambda head: head.prompt_tokens,
    "generated_token_count": lambda head: head.generated_tokens,
    "last_use_time": lambda head: head.last_use,
    "time_to_first_token.p99": lambda head: head.first_token_p99,
    "inter_token.p99": lambda head: head.inter_token_p99,
    "total.p99": lambda head: head.total_p99,
}
"""What adapters can be ordered by."""
