"""What the client takes and returns of adapters and their store: plain frozen values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from overtone.errors import OvertoneError

EventKind: TypeAlias = Literal["created", "updated", "deleted", "existing", "unspecified"]
"""What happened to an adapter; "existing": it is there already."""
ImportOutcome: TypeAlias = Literal["created", "updated", "unchanged", "refused", "unspecified"]


@dataclass(frozen=True)
class Adapter:
    """An adapter on the server. digest: of its newest version; versions: all that "ID@DIGEST" may name, newest first."""

    id: str
    uid: str
    digest: str
    family: str
    state: str
    pinned: bool
    labels: dict[str, str]
    size_bytes: int
    module_count: int
    parameter_count: int
    base_model_name_or_path: str
    warnings: list[str]
    create_time: datetime | None
    update_time: datetime | None
    etag: str
    versions: list[str]
    basis: str
    """Of PiCa: where its singular vectors came from ("own", "pinned", "assumed"), else empty."""
    tenant: str
    """Whose requests find it; empty: everybody's."""
    last_used_time: datetime | None
    base_fingerprint: str
    """Of the base model that it was checked against."""


@dataclass(frozen=True)
class Deletion:
    """Bytes that a deletion freed, and bytes that are freed when the last of `lease_count` running uses ends."""

    freed_bytes: int
    pending_bytes: int
    lease_count: int


@dataclass(frozen=True)
class AdapterEvent:
    """A change. adapter: as it was when the event was sent; None if it is deleted."""

    kind: EventKind
    id: str
    adapter: Adapter | None


@dataclass(frozen=True)
class WatchUpdate:
    """What a watch tells: changes in their order, or none as a sign of life. resume_token: goes on behind them; caught_up:
    what was there when the watch began has been told."""

    events: list[AdapterEvent]
    resume_token: str
    caught_up: bool


@dataclass(frozen=True)
class ImportEntry:
    """An adapter to import. files: name -> bytes, as in its folder; labels, tenant None: as they are."""

    id: str
    files: Mapping[str, bytes]
    labels: Mapping[str, str] | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class ImportResult:
    """What became of an entry. digest: of its version, empty if refused; error: why it was refused."""

    id: str
    outcome: ImportOutcome
    digest: str
    error: OvertoneError | None


@dataclass(frozen=True)
class Quantiles:
    """Latencies in seconds, within 8 %; zeros if there are none."""

    count: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class AdapterStatistics:
    """How an adapter was used since `first_use_time`; a request counts when it ends. id: empty for all others together;
    outcome_counts: "length", "eos", "stop", "cancelled", "deadline_exceeded", "error"."""

    id: str
    request_count: int
    outcome_counts: dict[str, int]
    error_count: int
    prompt_token_count: int
    generated_token_count: int
    first_use_time: datetime | None
    last_use_time: datetime | None
    time_to_first_token: Quantiles
    inter_token: Quantiles
    total: Quantiles


@dataclass(frozen=True)
class TopAdapters:
    """The first adapters of an order. tracked_count: how many have statistics of their own; folded_count: how often one lost
    them to another; other: what was counted of adapters that have none any more."""

    statistics: list[AdapterStatistics]
    tracked_count: int
    folded_count: int
    other: AdapterStatistics


@dataclass(frozen=True)
class StoreStatistics:
    """What the store holds now, and what it did since the server started (`_total`)."""

    store_id: str
    adapter_count: int
    version_count: int
    quarantined_count: int
    live_bytes: int
    disk_bytes: int
    disk_budget_bytes: int
    pack_count: int
    remote_bytes: int
    resident_count: int
    resident_bytes: int
    memory_bytes: int
    leased_count: int
    hit_total: int
    miss_total: int
    disk_load_total: int
    remote_load_total: int
    memory_load_total: int
    load_failure_total: int
    eviction_total: int
    negative_count: int
    negative_hit_total: int
    memo_bytes: int
    pending_pack_count: int
    failed_pass_total: int
    fetch_failure_total: int
    remote_error: str


@dataclass(frozen=True)
class Problem:
    """What a check found. digest: of the blob concerned, else empty; pack: 0 for a file of its own."""

    kind: str
    digest: str
    pack: int
    message: str


@dataclass(frozen=True)
class Check:
    """problem_count: all of them; problems: as many as the server tells."""

    problem_count: int
    problems: list[Problem]


@dataclass(frozen=True)
class Compaction:
    """What compaction did. check: what it could not move."""

    pack_count: int
    moved_bytes: int
    freed_bytes: int
    check: Check
