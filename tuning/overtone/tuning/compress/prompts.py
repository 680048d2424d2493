"""Prompts for the refit: a text file with one prompt a line, or JSON lines with "prompt" and perhaps "completion"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from overtone.errors import InvalidRequest


def read_prompts(path: Path) -> Iterator[str]:
    """One after another; empty lines are skipped. A name that ends in .jsonl means JSON lines.

    Raises `InvalidRequest` with file and line, and for a file without any prompt.
    """
    try:
        with path.open("rb") as file:
            found = False
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    found = True
                    yield _prompt(raw, f"{path.name}, line {number}", path.suffix == ".jsonl")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="refit") from error
    if not found:
        raise InvalidRequest(f"{path} has no prompts", field="refit")


def _prompt(raw: bytes, where: str, as_json: bool) -> str:
    try:
        text = raw.decode().rstrip("\r\n")
        if not as_json:
            return text
        sample = json.loads(text)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where}: not UTF-8 text", field="refit") from error
    except ValueError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}", field="refit") from error
    if not isinstance(sample, dict) or not isinstance(sample.get("prompt"), str):
        raise InvalidRequest(f'{where}: an object with the text "prompt" is needed', field="refit")
    completion = sample.get("completion", "")
    if not isinstance(completion, str):
        raise InvalidRequest(f"{where}: completion must be text", field="refit")
    return str(sample["prompt"]) + completion
