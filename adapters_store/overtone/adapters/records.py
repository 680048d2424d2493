"""The nouns of the store and the checks on what clients choose: ids, references, labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from overtone.adapters.text import shown
from overtone.errors import InvalidRequest

_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_TENANT = re.compile(r"[a-z0-9\-_.]{0,64}")
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{12,64}")
_MAX_LABELS, _MAX_LABEL_KEY, _MAX_LABEL_VALUE = 64, 63, 256


AdapterState = Literal["ready", "quarantined"]
"""Whether the current version can be served, or its stored content was found broken."""


@dataclass(frozen=True)
class AdapterRecord:
    """What the catalogue says of one adapter.

    `versions`: digests of all that are kept, newest first; `digest`: of the current one; `size_bytes`: of its canonical
    blob; `tenant`: "" for an adapter of nobody in particular; `base_fingerprint`: "" where an older version of Overtone
    stored it; `last_used_time`: None if it never was.
    """

    id: str
    uid: str
    digest: str
    family: str
    pinned: bool
    labels: Mapping[str, str]
    size_bytes: int
    module_count: int
    parameter_count: int
    base_model_name_or_path: str
    base_fingerprint: str
    warnings: tuple[str, ...]
    basis: str
    tenant: str
    state: AdapterState
    create_time: datetime
    update_time: datetime
    last_used_time: datetime | None
    etag: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """What the adapters of one recipe have in common."""

    family: str
    module_count: int
    parameter_count: int
    base_model_name_or_path: str
    base_fingerprint: str
    warnings: tuple[str, ...] = ()
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable content: everything about it that the blob's digest fixes. `shared`: digests of blobs that it refers
    to."""

    digest: str
    kind: Kind
    size_bytes: int
    resident_bytes: int
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreConfig:
    """`memory_bytes`: for resident adapters; `adapter_roots`: where `load_folder` may read; `keep_versions`: of one adapter;
    `pack_bytes`: see `Blobs`; `remote_url`: of object storage, "": none; `disk_bytes`: what is there too is removed here
    above this, 0: never; `upload_age_s`: after which also a pack that is not full goes to object storage."""

    root: Path
    memory_bytes: int
    max_upload_bytes: int
    strict_base: bool = False
    adapter_roots: tuple[Path, ...] = ()
    keep_versions: int = 10
    pack_bytes: int = 256 << 20
    remote_url: str = ""
    disk_bytes: int = 0
    upload_age_s: float = 300.0


@dataclass(frozen=True)
class StoreStats:
    """What there is (ids), what is in memory (versions), and counts since the store was opened.

    load_count: all that came into memory, by where from: the disk, a remote store, or what was in memory already (uploaded
    just now, brought by a request, added up). miss_count: uses that had to wait for a load. memo_bytes: of what loads share
    and nothing in memory uses; beside `resident_bytes`. live_bytes: of blobs that something refers to; disk_bytes: of
    packs here, remote_bytes: in object storage. negative: ids remembered as unknown. The last four: see `RemoteStats`.
    """

    registered_count: int
    resident_count: int
    resident_bytes: int
    memory_bytes: int
    leased_count: int
    load_count: int
    load_failure_count: int
    hit_count: int
    eviction_count: int
    miss_count: int = 0
    disk_load_count: int = 0
    remote_load_count: int = 0
    memory_load_count: int = 0
    memo_bytes: int = 0
    negative_count: int = 0
    negative_hit_count: int = 0
    store_id: str = ""
    version_count: int = 0
    quarantined_count: int = 0
    blob_count: int = 0
    live_bytes: int = 0
    disk_bytes: int = 0
    disk_budget_bytes: int = 0
    pack_count: int = 0
    remote_bytes: int = 0
    pending_pack_count: int = 0
    failed_pass_count: int = 0
    fetch_failure_count: int = 0
    remote_error: str = ""


def check_id(adapter_id: str, field: str = "adapter_id") -> str:
    """`adapter_id`, or `InvalidRequest`. An id is never a path, so it needs no escaping anywhere."""
    if not _ID.fullmatch(adapter_id):
        message = f"{shown(adapter_id)!r} is no adapter id: 1 to 128 of A-Z a-z 0-9 . _ -, letter or digit at both ends"
        raise InvalidRequest(message, field=field)
    return adapter_id


def check_tenant(tenant: str) -> str:
    """`tenant`, or `InvalidRequest`. The empty name is the tenant of whoever names none."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest('tenant must be at most 64 characters of "a-z0-9-_."', field="tenant")
    return tenant


def check_version(prefix: str, field: str = "version") -> str:
    """The beginning of a digest, or `InvalidRequest`."""
    if not _DIGEST_PREFIX.fullmatch(prefix):
        message = f"{shown(prefix)!r} is no version: 12 to 64 lower-case hexadecimal digits"
        raise InvalidRequest(message, field=field)
    return prefix


def parse_reference(reference: str) -> tuple[str, str]:
    """("id", digest prefix or "") of "id", "id@digest" or either with "adapters/" before it."""
    adapter_id, at, prefix = reference.removeprefix("adapters/").partition("@")
    check_id(adapter_id, "adapter")
    return adapter_id, check_version(prefix, "adapter") if at else ""


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of `labels`, or `InvalidRequest`."""
    problem = ""
    if len(labels) > _MAX_LABELS:
        problem = f"{len(labels)} labels are more than the {_MAX_LABELS} allowed"
    for key, value in labels.items():
        if not (1 <= len(key) <= _MAX_LABEL_KEY and key.isprintable()):
            problem = f"the label key {shown(key)!r} needs 1 to {_MAX_LABEL_KEY} printable characters"
        elif not (len(value) <= _MAX_LABEL_VALUE and value.isprintable()):
            problem = f"the label {shown(key)!r} needs at most {_MAX_LABEL_VALUE} printable characters"
    if problem:
        raise InvalidRequest(problem, field="labels")
    return dict(sorted(labels.items()))
