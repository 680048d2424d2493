"""A line's JSON into a record. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overtone.tuning.data.types import RawLine, Rejected


@dataclass(frozen=True, slots=True)
class Completion:
    """{"prompt": text, "completion": text}: the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """{"messages": [{"role", "content"}, …]}: every turn of the assistant is learned; the last turn is one."""

    messages: tuple[Mapping[str, str], ...]


Record = Completion | Conversation


def read_record(raw: RawLine) -> Record:
    """The record on a line; keys beside the known ones are ignored. Raises `Rejected`."""
    if raw.data is None:
        raise Rejected("line_too_long", "the line is longer than is read")
    item = _parsed(raw.data) if isinstance(raw.data, bytes) else raw.data
    if not isinstance(item, Mapping):
        raise Rejected("bad_json", f"a JSON object is needed, not {_kind(item)}")
    if "messages" in item:
        if "prompt" in item or "completion" in item:
            raise Rejected("bad_field", 'either "messages" or "prompt" and "completion", not both')
        return _conversation(item["messages"])
    prompt, completion = (_text(item, key, key) for key in ("prompt", "completion"))
    if not completion.strip():
        raise Rejected("empty_completion", '"completion" is empty')
    return Completion(prompt, completion)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("bad_utf8", f"not UTF-8 at byte {error.start} of the line") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("bad_json", f"not JSON: {error}") from error


def _conversation(messages: Any) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise Rejected("bad_field", f'"messages" must be a list of messages, not {_kind(messages)}')
    read = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    if read[-1]["role"] != "assistant":
        raise Rejected("empty_completion", '"messages" must end with a turn of the assistant')
    for index, message in enumerate(read):
        if message["role"] == "assistant" and not message["content"].strip():
            raise Rejected("empty_completion", f'"messages[{index}].content" is empty')
    return Conversation(read)


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise Rejected("bad_field", f'"{name}" must be an object, not {_kind(message)}')
    return {key: _text(message, key, f"{name}.{key}") for key in ("role", "content")}


def _text(item: Mapping[str, Any], key: str, name: str) -> str:
    if key not in item:
        raise Rejected("bad_field", f'"{name}" is missing')
    value = item[key]
    if not isinstance(value, str):
        raise Rejected("bad_field", f'"{name}" must be text, not {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise Rejected("bad_utf8", f'"{name}" has half a surrogate pair at character {error.start}') from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number" if isinstance(value, float) else "that")
