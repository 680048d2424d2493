"""What the client returns: plain frozen values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["length", "eos", "stop", "unspecified"]
"""Why a completion ended; "unspecified" only from a newer server that has a reason we do not know."""


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens at a position."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A generated token with its log-probability. rank: 1 for the likeliest."""

    id: int
    text: str
    logprob: float
    rank: int
    top: list[TopToken]


@dataclass(frozen=True)
class Prompt:
    """The prompt as the model saw it: `text` and `token_ids` if echo_prompt asked for them, `tokens`, those behind the
    first with their log-probabilities, if prompt_logprobs did."""

    text: str
    token_ids: list[int]
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Usage:
    """cached_prompt_tokens: of the prompt's tokens, those that the server found in its prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds since the request arrived at the server: until its first step, its first token and its last token."""

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Generated:
    """What came out of the model. `tokens` is empty unless log-probabilities were asked for; `prompt` likewise None."""

    text: str
    token_ids: list[int]
    tokens: list[Token]
    prompt: Prompt | None


@dataclass(frozen=True)
class AdapterUse:
    """An adapter version that served a request. adapter: empty if its files came with the request."""

    adapter: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Outcome:
    """How a completion ended. `adapter` and `adapter_digest` are empty for the base model and for several adapters;
    `adapters` are all that served it, in the order of their digests; `seed` is 0 if greedy; `stop_token_id` is set if a stop
    token ended it."""

    finish_reason: FinishReason
    stop: str
    usage: Usage
    timings: Timings
    adapter: str
    adapter_digest: str
    request_id: str
    seed: int
    adapters: list[AdapterUse]
    stop_token_id: int | None


@dataclass(frozen=True)
class Completion(Outcome, Generated):
    """A whole completion and how it ended. others: the further ones if more than one was asked for."""

    others: list[Completion]


@dataclass(frozen=True)
class Chunk(Generated):
    """What is new since the chunk before of the same completion, whose number is `index`. `prompt` is set at most in the
    first of completion 0, `completion` only in the last of each."""

    completion: Outcome | None
    index: int


@dataclass(frozen=True)
class Tokenized:
    """A prompt's token ids, and the text of each."""

    token_ids: list[int]
    tokens: list[str]


@dataclass(frozen=True)
class Module:
    """A linear layer that adapters may change."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelInfo:
    """The resident base model. max_context_tokens: prompt and completion together."""

    name: str
    architecture: str
    fingerprint: str
    dtype: str
    device: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: list[int]
    has_chat_template: bool
    modules: list[Module]
    server_version: str
    embeddings: list[Module]
