"""What passes between the parts of the data pipeline: raw lines, samples, and why a line is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

IGNORED = -100
"""The label of a token that is not learned (torch's `ignore_index`)."""

Reason = Literal["bad_utf8", "line_too_long", "bad_json", "bad_field", "empty_completion", "chat_template", "too_long"]

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask, labels: (rows, longest) int64, padded on the right; labels are IGNORED where not learned."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample came from. line: from 1; of an iterable, its item."""

    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.name}:{self.line}"


@dataclass(frozen=True, slots=True)
class RawLine:
    """One line as it was read. data: None if it was longer than is read; offset: in its file, of its first byte."""

    place: Place
    data: bytes | Mapping[str, Any] | None
    file: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for each, its label: itself if it is learned, else IGNORED."""

    input_ids: list[int]
    labels: list[int]
    place: Place
    truncated: bool = False


class Rejected(Exception):
    """A line that is no sample. Never leaves the pipeline: the policy turns it into an error or a count."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail
