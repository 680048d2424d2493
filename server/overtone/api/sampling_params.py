"""How a request samples, ends and is guided: protobuf to the engine's vocabulary, every range checked."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable

from overtone.engine.grammars import GuideSpec
from overtone.engine.types import SamplingParams, StoppingParams
from overtone.errors import BadSamplingParameter, InvalidRequest
from overtone.v1 import generation_pb2 as pb

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_CHOICES = 1024
MAX_GUIDE_BYTES = 65536
MAX_GUIDE_DEPTH = 64
MAX_COMPLETIONS = 16
_SEEDS = 2**63


def sampling(params: pb.SamplingParameters) -> SamplingParams:
    def number(name: str, default: float, ok: Callable[[float], bool], rule: str) -> float:
        value = getattr(params, name) if params.HasField(name) else default  # type: ignore[arg-type]
        if not math.isfinite(value) or not ok(value):
            raise BadSamplingParameter(f"sampling.{name} must be {rule}, not {value:g}", field=f"sampling.{name}")
        return float(value)

    temperature = number("temperature", 0.0, lambda v: v == 0 or 0.00999 <= v <= 100, "0 (greedy) or from 0.01 to 100")
    if params.HasField("seed") and params.seed >= _SEEDS:
        raise BadSamplingParameter("sampling.seed must be below 2^63", field="sampling.seed")
    seed = params.seed if params.HasField("seed") else secrets.randbelow(_SEEDS)
    return SamplingParams(
        temperature=temperature,
        top_k=params.top_k,
        top_p=number("top_p", 1.0, lambda v: 0 < v <= 1, "in (0, 1]"),
        min_p=number("min_p", 0.0, lambda v: 0 <= v <= 1, "in [0, 1]"),
        repetition_penalty=number("repetition_penalty", 1.0, lambda v: 0 < v <= 10, "in (0, 10]"),
        seed=0 if temperature == 0 else seed,
        typical_p=number("typical_p", 1.0, lambda v: 0 < v <= 1, "in (0, 1]"),
        presence_penalty=number("presence_penalty", 0.0, lambda v: -2 <= v <= 2, "in [-2, 2]"),
        frequency_penalty=number("frequency_penalty", 0.0, lambda v: -2 <= v <= 2, "in [-2, 2]"),
        logit_bias=_logit_bias(params),
    )


def completions(request: pb.GenerateRequest) -> int:
    """How many completions are asked for."""
    n = request.n if request.HasField("n") else 1
    if not 1 <= n <= MAX_COMPLETIONS:
        raise BadSamplingParameter(f"n must be from 1 to {MAX_COMPLETIONS}, not {n}", field="n")
    if n > 1 and request.sampling.temperature == 0:
        raise BadSamplingParameter(
            f"n is {n}, but greedy completions are all the same: set sampling.temperature above 0", field="n"
        )
    return n


def seed_of(seed: int, index: int) -> int:
    """The seed of completion `index` of a request."""
    return (seed + index) % _SEEDS


def stopping(criteria: pb.StoppingCriteria, default_max_new_tokens: int) -> StoppingParams:
    if len(criteria.stop) > MAX_STOPS:
        raise InvalidRequest(
            f"stopping.stop has {len(criteria.stop)} strings, at most {MAX_STOPS}", field="stopping.stop"
        )
    for index, stop in enumerate(criteria.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(stop)}",
                field=f"stopping.stop[{index}]",
            )
    tokens = len(criteria.stop_token_ids)
    if tokens > MAX_STOP_TOKENS:
        message = f"stopping.stop_token_ids has {tokens} tokens, at most {MAX_STOP_TOKENS}"
        raise InvalidRequest(message, field="stopping.stop_token_ids")
    most = criteria.max_new_tokens or default_max_new_tokens
    if criteria.min_new_tokens > most:
        message = f"stopping.min_new_tokens is {criteria.min_new_tokens}, more than the {most} of max_new_tokens"
        raise InvalidRequest(message, field="stopping.min_new_tokens")
    return StoppingParams(
        max_new_tokens=most,
        stop=tuple(criteria.stop),
        ignore_eos=criteria.ignore_eos,
        include_stop=criteria.include_stop,
        stop_token_ids=tuple(criteria.stop_token_ids),
        min_new_tokens=criteria.min_new_tokens,
    )


def guided(request: pb.GenerateRequest) -> GuideSpec | None:
    """The guide that the request asks for, not compiled yet."""
    if not request.sampling.HasField("guided"):
        return None
    guide = request.sampling.guided
    kind = guide.WhichOneof("guide")
    if kind is None:
        raise InvalidRequest(
            "sampling.guided is empty: set json_schema, regex, choice, json_object or grammar", field="sampling.guided"
        )
    if request.stopping.ignore_eos:
        raise InvalidRequest("ignore_eos goes on after a guide's end: unset one", field="stopping.ignore_eos")
    field = f"sampling.guided.{kind}"
    if kind == "json_object":
        if not guide.json_object:
            raise InvalidRequest("sampling.guided.json_object can only be true", field=field)
        return GuideSpec(kind, "")
    text = _choices(guide.choice, field) if kind == "choice" else getattr(guide, kind)
    size = len(text.encode())
    if not 1 <= size <= MAX_GUIDE_BYTES:
        raise InvalidRequest(f"{field} must have 1 to {MAX_GUIDE_BYTES} bytes, not {size}", field=field)
    if kind == "json_schema":
        _check_schema(text, field)
    return GuideSpec(kind, text)


def _logit_bias(params: pb.SamplingParameters) -> tuple[tuple[int, float], ...]:
    if len(params.logit_bias) > MAX_BIASES:
        message = f"sampling.logit_bias has {len(params.logit_bias)} tokens, at most {MAX_BIASES}"
        raise BadSamplingParameter(message, field="sampling.logit_bias")
    for token, bias in params.logit_bias.items():
        if not abs(bias) <= MAX_BIAS:  # NaN is not either
            field = f"sampling.logit_bias[{token}]"
            raise BadSamplingParameter(f"{field} must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}], not {bias:g}", field=field)
    return tuple(sorted(params.logit_bias.items()))


def _choices(choice: pb.Choice, field: str) -> str:
    if not 1 <= len(choice.choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{field} needs 1 to {MAX_CHOICES} texts, not {len(choice.choices)}", field=field)
    if not all(choice.choices):
        raise InvalidRequest(f"a text of {field} is empty", field=field)
    return json.dumps(list(choice.choices), ensure_ascii=False)


def _check_schema(text: str, field: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not JSON: {error}", field=field) from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field} must be a JSON object", field=field)
    level: list[object] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_GUIDE_DEPTH:
            raise InvalidRequest(f"{field} is nested deeper than {MAX_GUIDE_DEPTH} levels", field=field)
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
