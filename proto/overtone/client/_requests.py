"""Python arguments to protobuf requests. What is wrong with an argument's form is said here, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from overtone.client import _folder
from overtone.v1 import generation_pb2

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: {"role": ..., "content": ...} for each message."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. None, or leaving one out, is the server's default."""

    token_ids: Sequence[int] | None
    """Instead of a text prompt: token ids, used as they are."""
    messages: Messages | None
    """Instead of a text prompt: a conversation, rendered by the model's chat template."""
    adapter: str | Path | None
    """"ID" or "ID@DIGEST", or a folder on this machine whose adapter travels with the request; None: the base model."""
    adapters: Mapping[str | Path, float] | None
    """Instead of `adapter`: several, whose changes of the weights add up, each times its weight."""
    max_new_tokens: int | None
    temperature: float | None
    """0, the default: greedy."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Token id -> what is added to its logit."""
    json_schema: str | Mapping[str, Any] | None
    """The output is JSON that this schema accepts. At most one of this and the next four."""
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    """In llguidance's dialect of Lark."""
    seed: int | None
    n: int | None
    """Completions of the prompt, with the seeds seed, seed + 1, ..."""
    stop: Sequence[str]
    """Generation ends before the first of these."""
    stop_token_ids: Sequence[int]
    min_new_tokens: int
    include_stop: bool
    ignore_eos: bool
    logprobs: bool
    top_n: int
    """With each token also the n likeliest alternatives; implies logprobs."""
    prompt_logprobs: bool
    """Return `prompt.tokens`, with the log-probability of every token of the prompt but the first."""
    echo_prompt: bool
    request_id: str | None
    tenant: str | None
    """On whose behalf: tenants take turns by their weights and share no cached pages."""
    priority: int | None
    """From -10 to 10, larger first; default 0."""
    cache_salt: str | None
    """Cached prompt pages are shared only where it is the same."""
    timeout: float | None
    """Seconds until DeadlineExceeded, instead of the client's; None: no limit."""


_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed",
)  # fmt: skip
_GUIDES = ("json_schema", "json_object", "regex", "choice", "grammar")


def generate_request(prompt: str | None, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """The request for `generate` and `stream`. Exactly one of prompt, token_ids and messages must be given."""
    unknown = options.keys() - GenerateOptions.__optional_keys__
    if unknown:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
    given: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    _exactly_one(prompt=prompt, token_ids=given.get("token_ids"), messages=given.get("messages"))
    request = generation_pb2.GenerateRequest(
        sampling=generation_pb2.SamplingParameters(
            **{name: given[name] for name in _SAMPLING if name in given}, guided=_guided(given)
        ),
        stopping=_stopping(given),
        response=generation_pb2.ResponseOptions(
            logprobs=given.get("logprobs", False),
            top_n=given.get("top_n", 0),
            echo_prompt=given.get("echo_prompt", False),
            prompt_logprobs=given.get("prompt_logprobs", False),
        ),
        request_id=given.get("request_id", ""),
        n=given.get("n"),
        tenant=given.get("tenant", ""),
        priority=given.get("priority", 0),
        cache_salt=given.get("cache_salt", ""),
    )
    _name_adapters(request, given.get("adapter"), given.get("adapters"))
    if prompt is not None:
        request.text = prompt
    elif "messages" in given:
        request.chat.CopyFrom(_chat(given["messages"]))
    else:
        request.token_ids.CopyFrom(generation_pb2.TokenIds(ids=given["token_ids"]))
    return request


def _guided(given: Mapping[str, Any]) -> generation_pb2.Guided | None:
    names = [name for name in _GUIDES if name in given]
    if not names:
        return None
    if len(names) > 1:
        raise TypeError(f"give {names[0]} or {names[1]}, not both")
    (name,), value = names, given[names[0]]
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value)
    if name == "choice":
        if isinstance(value, str):
            raise TypeError("choice must be a list of texts, not a str")
        value = generation_pb2.Choice(choices=value)
    return generation_pb2.Guided(**{name: value})


def _name_adapters(
    request: generation_pb2.GenerateRequest, one: str | Path | None, several: Mapping[str | Path, float] | None
) -> None:
    if one is not None and several is not None:
        raise TypeError("give adapter or adapters, not both")
    if isinstance(one, str):
        request.adapter = one
    elif one is not None:
        request.adapters.append(generation_pb2.AdapterShare(inline=_folder.inline(one)))
    for source, weight in (several or {}).items():
        share = generation_pb2.AdapterShare(weight=weight)
        if isinstance(source, str):
            share.adapter = source
        else:
            share.inline.CopyFrom(_folder.inline(source))
        request.adapters.append(share)


def tokenize_request(prompt: str | None, messages: Messages | None) -> generation_pb2.TokenizeRequest:
    _exactly_one(prompt=prompt, messages=messages)
    if messages is not None:
        return generation_pb2.TokenizeRequest(chat=_chat(messages))
    return generation_pb2.TokenizeRequest(text=prompt or "")


def _exactly_one(**prompts: object) -> None:
    given = [name for name, value in prompts.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(given) if given else "none"
        raise ValueError(f"give exactly one of {', '.join(prompts)}; got {what}")
    if given == ["prompt"] and not isinstance(prompts["prompt"], str):
        raise TypeError(f"prompt must be a str, not {type(prompts['prompt']).__name__}")


def _stopping(given: Mapping[str, Any]) -> generation_pb2.StoppingCriteria:
    limit = given.get("max_new_tokens")
    if limit is not None and limit < 1:
        # On the wire 0 means the server's default, which is not what somebody who writes 0 expects.
        raise ValueError(f"max_new_tokens must be at least 1, not {limit}")
    stop = given.get("stop", ())
    return generation_pb2.StoppingCriteria(
        max_new_tokens=limit or 0,
        # A lone string is a sequence too, of its characters.
        stop=[stop] if isinstance(stop, str) else stop,
        ignore_eos=given.get("ignore_eos", False),
        include_stop=given.get("include_stop", False),
        stop_token_ids=given.get("stop_token_ids", ()),
        min_new_tokens=given.get("min_new_tokens", 0),
    )


def _chat(messages: Messages) -> generation_pb2.Chat:
    if isinstance(messages, str | Mapping):
        raise TypeError("messages must be a list of {'role': ..., 'content': ...}")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise TypeError(f"a message must have exactly 'role' and 'content', not {message!r}")
    return generation_pb2.Chat(messages=[generation_pb2.ChatMessage(**message) for message in messages])
