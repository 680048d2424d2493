"""The nouns of the store and the checks on what clients choose: ids, references, labels."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from overtone.adapters.text import shown
from overtone.errors import InvalidRequest

_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{12,64}")
_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_MAX_LABELS, _MAX_LABEL_KEY, _MAX_LABEL_VALUE = 64, 63, 256


@dataclass(frozen=True)
class AdapterRecord:
    """What the catalogue says of one adapter. `versions`: digests, newest first; `size_bytes`: of the canonical blob."""

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
    warnings: tuple[str, ...]
    basis: str
    create_time: datetime
    update_time: datetime
    etag: str
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """One immutable content: everything about it that the blob's digest fixes. `shared`: digests of blobs that it refers
    to."""

    digest: str
    family: str
    size_bytes: int
    resident_bytes: int
    module_count: int
    parameter_count: int
    base_model_name_or_path: str
    warnings: tuple[str, ...]
    basis: str = ""
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreConfig:
    """`memory_bytes`: for resident adapters; `adapter_roots`: where `load_folder` may read."""

    root: Path
    memory_bytes: int
    max_upload_bytes: int
    strict_base: bool = False
    adapter_roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StoreStats:
    """What there is (ids), what is in memory (versions), and counts since the store was opened.

    load_count: all that came into memory, by where from: the disk, a remote store, or what was in memory already (uploaded
    just now, brought by a request, added up). miss_count: uses that had to wait for a load. memo_bytes: of what loads share
    and nothing in memory uses; beside `resident_bytes`.
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


def check_id(adapter_id: str, field: str = "adapter_id") -> str:
    """`adapter_id`, or `InvalidRequest`. An id is never a path, so it needs no escaping anywhere."""
    if not _ID.fullmatch(adapter_id):
        message = f"{shown(adapter_id)!r} is no adapter id: 1 to 128 of A-Z a-z 0-9 . _ -, letter or digit at both ends"
        raise InvalidRequest(message, field=field)
    return adapter_id


def parse_reference(reference: str) -> tuple[str, str]:
    """("id", digest prefix or "") of "id", "id@digest" or either with "adapters/" before it."""
    adapter_id, at, prefix = reference.removeprefix("adapters/").partition("@")
    check_id(adapter_id, "adapter")
    if at and not _DIGEST_PREFIX.fullmatch(prefix):
        message = f"{shown(prefix)!r} is no version: 12 to 64 lower-case hexadecimal digits"
        raise InvalidRequest(message, field="adapter")
    return adapter_id, prefix


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


def check_page_size(page_size: int) -> int:
    """How many records a page has: 100 for 0, at most 1000; `InvalidRequest` if negative."""
    if page_size < 0:
        raise InvalidRequest(f"page_size is {page_size}, less than 0", field="page_size")
    return min(page_size or _DEFAULT_PAGE, _LARGEST_PAGE)


def make_page_token(last_id: str) -> str:
    """Opaque to clients: where the next page begins."""
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def parse_page_token(token: str) -> str:
    """The last id of the page before, "" for the first page; `InvalidRequest` for a token that we did not make."""
    if not token:
        return ""
    try:
        last_id = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except ValueError:
        last_id = ""
    if not _ID.fullmatch(last_id):
        raise InvalidRequest(f"{shown(token)!r} is no page token", field="page_token")
    return last_id
