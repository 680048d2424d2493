"""The one place that decides what becomes of a line that is no sample: an error, or a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from overtone.errors import InvalidRequest
from overtone.tuning.data.encode import Encoder
from overtone.tuning.data.types import RawLine, Reason, Rejected, Sample


@dataclass(frozen=True, slots=True)
class Skipped:
    """Lines that were left out for one reason. first: the first of them, with what was wrong."""

    lines: int
    first: str


@dataclass(slots=True)
class Tally:
    """What was met so far. Each line counts once, however often it is read."""

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    skipped: dict[Reason, Skipped] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        skipped = {reason: [each.lines, each.first] for reason, each in self.skipped.items()}
        counts = {name: getattr(self, name) for name in ("samples", "tokens", "longest", "truncated")}
        return {**counts, "skipped": skipped}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Tally:
        skipped = {reason: Skipped(*each) for reason, each in state["skipped"].items()}
        return cls(**{**state, "skipped": skipped})


class Intake:
    """Lines to samples by policy. malformed: "error" or "skip"; too_long: also "truncate", which the encoder does."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        malformed: Literal["error", "skip"],
        too_long: Literal["error", "skip", "truncate"],
        field: str,
    ) -> None:
        self._encoder = encoder
        self._malformed_skips = malformed == "skip"
        self._too_long_skips = too_long == "skip" or (too_long == "truncate" and self._malformed_skips)
        self._field = field
        self.tally = Tally()

    def take(self, raw: RawLine, *, count: bool) -> Sample | None:
        """The sample, or None for a line that is left out. Raises `InvalidRequest` with file, line and reason."""
        try:
            sample = self._encoder.sample(raw)
        except Rejected as rejected:
            if not (self._too_long_skips if rejected.reason == "too_long" else self._malformed_skips):
                raise InvalidRequest(
                    f"{self._field}: {raw.place}: {rejected.detail}",
                    field=self._field,
                    metadata={"reason": rejected.reason, "line": str(raw.place.line), "file": raw.place.name},
                ) from rejected
            if count:
                self._left_out(rejected, raw)
            return None
        if count:
            self.tally.samples += 1
            self.tally.tokens += len(sample.input_ids)
            self.tally.longest = max(self.tally.longest, len(sample.input_ids))
            self.tally.truncated += sample.truncated
        return sample

    def _left_out(self, rejected: Rejected, raw: RawLine) -> None:
        known = self.tally.skipped.get(rejected.reason)
        first = known.first if known else f"{raw.place}: {rejected.detail}"
        self.tally.skipped[rejected.reason] = Skipped((known.lines if known else 0) + 1, first)
