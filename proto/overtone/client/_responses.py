"""Protobuf messages to the client's types."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from overtone.client import types
from overtone.v1 import generation_pb2

_FINISH_REASONS: dict[int, types.FinishReason] = {
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_EOS: "eos",
    generation_pb2.FINISH_REASON_STOP: "stop",
}


def completion(message: generation_pb2.GenerateResponse) -> types.Completion:
    ended = outcome(message.outcome)
    return types.Completion(
        text=message.text,
        token_ids=list(message.token_ids),
        tokens=_tokens(message.tokens),
        prompt=_prompt(message),
        others=[_another(each) for each in message.others],
        **vars(ended),
    )


def _another(message: generation_pb2.Completion) -> types.Completion:
    return types.Completion(
        text=message.text,
        token_ids=list(message.token_ids),
        tokens=_tokens(message.tokens),
        prompt=None,
        others=[],
        **vars(outcome(message.outcome)),
    )


def chunk(message: generation_pb2.StreamGenerateResponse) -> types.Chunk:
    return types.Chunk(
        text=message.text,
        token_ids=list(message.token_ids),
        tokens=_tokens(message.tokens),
        prompt=_prompt(message),
        completion=outcome(message.outcome) if message.HasField("outcome") else None,
        index=message.index,
    )


def outcome(message: generation_pb2.Outcome) -> types.Outcome:
    timings = message.timings
    return types.Outcome(
        finish_reason=_FINISH_REASONS.get(message.finish_reason, "unspecified"),
        stop=message.stop,
        usage=types.Usage(
            message.usage.prompt_tokens, message.usage.completion_tokens, message.usage.cached_prompt_tokens
        ),
        timings=types.Timings(seconds(timings.queue), seconds(timings.first_token), seconds(timings.total)),
        adapter=message.adapter,
        adapter_digest=message.adapter_digest,
        request_id=message.request_id,
        seed=message.seed,
        adapters=[types.AdapterUse(each.adapter, each.digest, each.weight) for each in message.adapters],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
    )


def tokenized(message: generation_pb2.TokenizeResponse) -> types.Tokenized:
    return types.Tokenized(list(message.token_ids), list(message.tokens))


def model(message: generation_pb2.Model) -> types.ModelInfo:
    return types.ModelInfo(
        name=message.name,
        architecture=message.architecture,
        fingerprint=message.fingerprint,
        dtype=message.dtype,
        device=message.device,
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        eos_token_ids=list(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        modules=[types.Module(each.name, each.out_features, each.in_features) for each in message.modules],
        server_version=message.server_version,
        embeddings=[types.Module(each.name, each.out_features, each.in_features) for each in message.embeddings],
    )


def _tokens(messages: Sequence[generation_pb2.TokenInfo]) -> list[types.Token]:
    return [
        types.Token(
            each.id, each.text, each.logprob, each.rank, [types.TopToken(t.id, t.text, t.logprob) for t in each.top]
        )
        for each in messages
    ]


def _prompt(
    message: generation_pb2.GenerateResponse | generation_pb2.StreamGenerateResponse,
) -> types.Prompt | None:
    if not message.HasField("prompt"):
        return None
    return types.Prompt(message.prompt.text, list(message.prompt.token_ids), _tokens(message.prompt.tokens))


def seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
