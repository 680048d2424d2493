"""Protobuf to the engine's vocabulary and back: the only validator of generation requests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from overtone.adapters.lease import Share
from overtone.adapters.store import Wanted
from overtone.api import sampling_params
from overtone.api.shares import wanted_adapters
from overtone.api.tenants import is_tenant
from overtone.engine.grammars import GuideSpec
from overtone.engine.logprobs import MAX_TOP_N
from overtone.engine.types import Finish, FinishReason, Request, SamplingParams, StoppingParams, TokenLogprob
from overtone.errors import BadSamplingParameter, InvalidRequest, PromptTooLong
from overtone.v1 import generation_pb2 as pb

MAX_REQUEST_ID_CHARS = 128
MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_PRIORITY = 10
MAX_SALT_CHARS = 128

_REASONS = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
}


PromptSource: TypeAlias = str | tuple[int, ...] | list[dict[str, str]]
"""Text, token ids, or chat messages with role and content."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose request it is: what decides when it runs and with whom it shares cached pages."""

    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A generation request that is sound in itself; its prompt is not tokenised and its adapter not resolved yet."""

    request_id: str
    prompt: PromptSource
    adapters: tuple[Wanted, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    logprobs: bool
    top_n: int
    echo_prompt: bool
    prompt_logprobs: bool
    n: int
    guide: GuideSpec | None
    turn: Turn = Turn()
    length_defaulted: bool = False  # max_new_tokens is the server's default: to be cut to what the context leaves


def draft(request: pb.GenerateRequest, default_max_new_tokens: int, max_tokens: int, max_inline_bytes: int) -> Draft:
    """Checks everything that can be checked without the model. Raises `InvalidRequest` naming the field."""
    request_id = request.request_id or secrets.token_hex(8)
    if len(request_id) > MAX_REQUEST_ID_CHARS or not request_id.isprintable():
        raise InvalidRequest("request_id must be at most 128 printable characters", field="request_id")
    top_n = request.response.top_n
    if top_n > MAX_TOP_N:
        raise BadSamplingParameter(f"response.top_n must be at most {MAX_TOP_N}, not {top_n}", field="response.top_n")
    return Draft(
        request_id=request_id,
        prompt=prompt(request, max_tokens),
        adapters=wanted_adapters(request, max_inline_bytes),
        sampling=sampling_params.sampling(request.sampling),
        stopping=sampling_params.stopping(request.stopping, default_max_new_tokens),
        logprobs=request.response.logprobs or top_n > 0,
        top_n=top_n,
        echo_prompt=request.response.echo_prompt,
        prompt_logprobs=request.response.prompt_logprobs,
        n=sampling_params.completions(request),
        guide=sampling_params.guided(request),
        turn=_turn(request),
        length_defaulted=request.stopping.max_new_tokens == 0,
    )


def _turn(request: pb.GenerateRequest) -> Turn:
    if not is_tenant(request.tenant):
        raise InvalidRequest('tenant must be at most 64 characters of "a-z0-9-_."', field="tenant")
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, not {request.priority}", field="priority"
        )
    if len(request.cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must be at most {MAX_SALT_CHARS} characters", field="cache_salt")
    return Turn(request.tenant, request.priority, request.cache_salt)


def prompt(request: pb.GenerateRequest | pb.TokenizeRequest, max_tokens: int) -> PromptSource:
    """Text, token ids or messages, whichever is set."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "chat":
        if not 1 <= len(request.chat.messages) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"chat needs 1 to {MAX_MESSAGES} messages, not {len(request.chat.messages)}", field="chat.messages"
            )
        for index, message in enumerate(request.chat.messages):
            if not 1 <= len(message.role) <= MAX_ROLE_CHARS:
                raise InvalidRequest(
                    f"a role must have 1 to {MAX_ROLE_CHARS} characters", field=f"chat.messages[{index}].role"
                )
        return [{"role": m.role, "content": m.content} for m in request.chat.messages]
    if kind == "token_ids" and isinstance(request, pb.GenerateRequest):
        if len(request.token_ids.ids) > max_tokens:
            raise PromptTooLong(
                f"the prompt's {len(request.token_ids.ids)} tokens exceed the context of {max_tokens}",
                field="token_ids.ids",
            )
        return tuple(request.token_ids.ids)
    raise InvalidRequest("no prompt: set text, token_ids or chat", field="prompt")


def token_infos(
    ids: Sequence[int], logprobs: Sequence[TokenLogprob], token_text: Callable[[int], str]
) -> list[pb.TokenInfo]:
    """One message per token; empty if no log-probabilities were asked for."""
    return [
        pb.TokenInfo(
            id=token,
            text=token_text(token),
            logprob=info.logprob,
            rank=info.rank,
            top=[pb.TopToken(id=t.token_id, text=token_text(t.token_id), logprob=t.logprob) for t in info.top],
        )
        for token, info in zip(ids, logprobs, strict=False)
    ]


def outcome(finish: Finish, draft: Draft, request: Request, shares: Sequence[Share]) -> pb.Outcome:
    (one,) = shares if len(shares) == 1 else (Share("", ""),)
    return pb.Outcome(
        finish_reason=_REASONS[finish.reason],
        stop=finish.stop,
        usage=pb.Usage(
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=finish.completion_tokens,
            cached_prompt_tokens=finish.cached_prompt_tokens,
        ),
        timings=pb.Timings(
            queue=_duration(finish.queue_s),
            first_token=_duration(finish.first_token_s),
            total=_duration(finish.total_s),
        ),
        adapter=one.adapter_id,
        adapter_digest=one.digest,
        adapters=[pb.AdapterUse(adapter=s.adapter_id, digest=s.digest, weight=s.weight) for s in shares],
        request_id=draft.request_id,
        seed=request.sampling.seed,
        stop_token_id=finish.stop_token_id,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration
