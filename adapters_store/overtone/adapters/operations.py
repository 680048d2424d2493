"""What the store's operations take and answer, beside records and leases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from overtone.adapters.files import AdapterFiles
from overtone.adapters.packs import Compaction, Progress
from overtone.adapters.records import AdapterRecord
from overtone.errors import OvertoneError

__all__ = ["Compaction", "Deletion", "Event", "ImportItem", "ImportResult", "Kind", "Problem", "Progress"]

Kind: TypeAlias = Literal["created", "updated", "deleted"]


@dataclass(frozen=True, slots=True)
class ImportItem:
    """One adapter of a batch. labels, tenant None: as they are."""

    adapter_id: str
    files: AdapterFiles
    labels: Mapping[str, str] | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What became of one. digest: of the version, "" if refused; error: why it was refused."""

    adapter_id: str
    digest: str
    outcome: Literal["created", "updated", "unchanged", "refused"]
    error: OvertoneError | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a deletion frees: bytes at once, bytes when the last of `leases` on the deleted versions ends."""

    freed_bytes: int
    pending_bytes: int
    leases: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change that has happened. sequence: rises by one; record: as it was made, or before it was deleted, where that was
    at hand."""

    sequence: int
    kind: Kind
    record: AdapterRecord | None
    adapter_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check found. kind: a word for programs; digest: of the blob concerned, "" if it is no single one; pack: 0 for a
    file of its own; what: one sentence for the operator."""

    kind: str
    digest: str
    pack: int
    what: str
