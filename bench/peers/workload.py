"""What is asked of every system: prompts as token ids, the jobs of the client, and the order of the adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

FIRST_ORDINARY_TOKEN = 100  # below are control tokens

Kind = Literal["closed", "open", "intrusion"]


@dataclass(frozen=True)
class Job:
    """One run of the client against one server.

    closed: `concurrency` requests at a time until `requests` are done. open: `requests` arrivals of a Poisson process of
    `rate` per second. intrusion: `concurrency` streams at once, and once all of them stream a prompt of `long_tokens`
    (0: none, for comparison).
    """

    target: Literal["vllm", "overtone"]
    address: str
    kind: Kind = "closed"
    requests: int = 64
    concurrency: int = 16
    rate: float = 0.0
    prompt_tokens: int = 19
    long_tokens: int = 0
    new_tokens: int = 64
    adapters: tuple[str, ...] = ()
    vocabulary: int = 49152


def prompt_ids(index: int, length: int, vocabulary: int) -> list[int]:
    """Token ids of prompt `index`: the same for every system and run, and no two prompts share a prefix by design."""
    if vocabulary <= FIRST_ORDINARY_TOKEN:
        raise ValueError(f"vocabulary must exceed {FIRST_ORDINARY_TOKEN}, is {vocabulary}")
    draw = random.Random(index)
    return [draw.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(length)]


def adapter_of(index: int, adapters: tuple[str, ...]) -> str:
    """Round robin; "" is the base model."""
    return adapters[index % len(adapters)] if adapters else ""


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests arrive: a Poisson process of `rate` per second, the first at 0."""
    if rate <= 0:
        raise ValueError(f"rate must be positive, is {rate}")
    draw = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + draw.expovariate(rate))
    return times[:count]
