"""Requests and sequences with everything that a test does not care about filled in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from overtone.engine.detokenizer import Detokenizer
from overtone.engine.guides import Guide
from overtone.engine.sequence import Sequence as EngineSequence
from overtone.engine.types import Request, SamplingParams, StoppingParams


def make_request(
    request_id: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 8,
    *,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    include_stop: bool = False,
    deadline: float | None = None,
    adapter: Mapping[str, Any] | None = None,
    logprobs: bool = False,
    top_n: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    min_new_tokens: int = 0,
    prompt_logprobs: bool = False,
    guide: Guide | None = None,
    adapter_key: str | None = None,
    tenant: str = "",
    priority: int = 0,
    cache_salt: str = "",
    **sampling: Any,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        sampling=SamplingParams(**sampling),
        stopping=StoppingParams(max_new_tokens, stop, ignore_eos, include_stop, stop_token_ids, min_new_tokens),
        arrival_time=time.monotonic(),
        deadline=deadline,
        adapter=adapter,
        adapter_key=("" if adapter is None else f"key-{id(adapter)}") if adapter_key is None else adapter_key,
        logprobs=logprobs,
        top_n=top_n,
        prompt_logprobs=prompt_logprobs,
        guide=guide,
        tenant=tenant,
        priority=priority,
        cache_salt=cache_salt,
    )


def make_sequence(
    request_id: str = "r", prompt_ids: Sequence[int] = (1,), max_new_tokens: int = 8, **options: Any
) -> EngineSequence:
    """A sequence whose tokens have no text."""
    return EngineSequence(
        make_request(request_id, prompt_ids, max_new_tokens, **options), Detokenizer(lambda ids: "", prompt_ids)
    )
