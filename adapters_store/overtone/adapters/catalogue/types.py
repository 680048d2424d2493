"""What goes into the catalogue and comes out of it, beside the records that clients see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from overtone.adapters.records import AdapterState, Version


@dataclass(frozen=True, slots=True)
class Options:
    """What a commit says besides the content. `pinned`, `labels` and `tenant` None: as they are."""

    pinned: bool | None = None
    labels: Mapping[str, str] | None = None
    tenant: str | None = None
    create_only: bool = False
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """`version` is to be the current one of `adapter_id`."""

    adapter_id: str
    version: Version
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an entry. "exists": refused, because it was to be created only; pinned: whether the adapter is."""

    adapter_id: str
    digest: str
    outcome: Literal["created", "updated", "unchanged", "exists"]
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Freed:
    """Digests of versions that no adapter has any more. They are known until they are released."""

    versions: tuple[str, ...]


class Resolved(NamedTuple):
    """The version that a reference means."""

    digest: str
    resident_bytes: int
    tenant: str
    state: AdapterState
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Counts:
    """`versions`: contents; `blobs` and `bytes`: of those and of what they share."""

    adapters: int
    versions: int
    blobs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: "file": SQLite finds the file broken; "reference": something is named that is not there; "count": a kept
    number is not what counting gives; "facts": two places say different things of one adapter."""

    kind: Literal["file", "reference", "count", "facts"]
    subject: str
    what: str
