"""The engine's vocabulary. No logic beyond properties; no torch, no gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from overtone.errors import OvertoneError

if TYPE_CHECKING:
    from overtone.engine.guides import Guide


class FinishReason(Enum):
    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen (see `SamplingParameters` in generation.proto). temperature 0: greedy.

    logit_bias: distinct token ids, each with what is added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a generation ends (see `StoppingCriteria` in generation.proto)."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, validated. Times are `time.monotonic()` seconds.

    adapter: the resident adapter's deltas by module, None for the base model; adapter_key: its version digest, by which
    pages of the KV cache are shared and adapters take turns (with an adapter but without a key nothing is shared). The
    caller keeps the adapter pinned until the request's last event. tenant: takes turns with the others, and shares pages
    with none of them; cache_salt: pages are shared only where it is the same; priority: larger goes first. prompt_logprobs:
    the first event has them; the whole prompt must then be computed for this request. guide: what the output must match.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    arrival_time: float
    deadline: float | None = None
    adapter: Mapping[str, Any] | None = None
    adapter_key: str = ""
    logprobs: bool = False
    top_n: int = 0
    prompt_logprobs: bool = False
    guide: Guide | None = None
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""

    @property
    def max_tokens(self) -> int:
        """Prompt and completion, if it gets as long as it may."""
        return len(self.prompt_ids) + self.stopping.max_new_tokens


@dataclass(frozen=True, slots=True)
class TopToken:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's probabilities at temperature 1. rank: 1 for the likeliest token."""

    logprob: float
    rank: int
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended. Seconds since arrival. cached_prompt_tokens: found in the prefix cache."""

    reason: FinishReason
    stop: str
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    stop_token_id: int | None = None
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What a step brought one request. The last event of a request has either `finish` or `error`.

    prompt_logprobs: of the prompt's tokens but the first, in the request's first event if asked for.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: OvertoneError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class StepStats:
    """The engine after one step. pages_used: by requests; pages_cached: findable by their contents, used or not; the
    prefix cache's tokens and evictions are those since the step before."""

    duration_s: float = 0.0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    chunks: int = 0
    distinct_adapters: int = 0
    preemptions: int = 0
    pages_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evictions: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """All that one step has to tell: delivered by one call."""

    events: tuple[Event, ...]
    stats: StepStats = field(default_factory=StepStats)
