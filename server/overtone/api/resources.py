"""The store's nouns as messages of the control plane, and names and options back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TypedDict

from google.protobuf.duration_pb2 import Duration

from overtone.adapters.files import AdapterFiles, layout_of
from overtone.adapters.operations import ImportItem, ImportResult
from overtone.adapters.store import AdapterRecord, AdapterStore
from overtone.api.latency import Quantiles
from overtone.api.status import to_status
from overtone.api.tenants import is_tenant
from overtone.api.usage import Usage
from overtone.errors import InvalidRequest
from overtone.v1 import adapters_pb2 as pb

_STATES = {
    "stored": pb.Adapter.STATE_STORED,
    "loading": pb.Adapter.STATE_LOADING,
    "resident": pb.Adapter.STATE_RESIDENT,
}
_OUTCOMES = {
    "created": pb.ImportResult.OUTCOME_CREATED,
    "updated": pb.ImportResult.OUTCOME_UPDATED,
    "unchanged": pb.ImportResult.OUTCOME_UNCHANGED,
    "refused": pb.ImportResult.OUTCOME_REFUSED,
}


class Options(TypedDict):
    """Keyword arguments of the store's commits."""

    pinned: bool | None
    labels: Mapping[str, str] | None
    tenant: str | None
    create_only: bool
    validate_only: bool


def adapter_id(name: str, field: str = "name") -> str:
    """ "adapters/ID" -> "ID"."""
    collection, slash, identifier = name.partition("/")
    if collection != "adapters" or not slash:
        raise InvalidRequest(f"{field} must look like adapters/ID, not {name[:100]!r}", field=field)
    return identifier


def id_of_statistics(name: str) -> str:
    """ "adapters/ID/statistics" -> "ID"."""
    parent, slash, singleton = name.rpartition("/")
    if not slash or singleton != "statistics":
        raise InvalidRequest(f"name must look like adapters/ID/statistics, not {name[:100]!r}", field="name")
    return adapter_id(parent)


def options(message: pb.AdapterOptions) -> Options:
    return {
        "pinned": message.pinned if message.HasField("pinned") else None,
        "labels": dict(message.labels) or None,
        "tenant": tenant(message, "options.tenant"),
        "create_only": message.create_only,
        "validate_only": message.validate_only,
    }


def tenant(message: pb.AdapterOptions | pb.ImportItem, field: str) -> str | None:
    if not is_tenant(message.tenant):
        raise InvalidRequest(f'{field} must be at most 64 characters of "a-z0-9-_."', field=field)
    return message.tenant if message.HasField("tenant") else None


def import_item(message: pb.ImportItem) -> ImportItem:
    """Raises `InvalidAdapter` for files too many or too few."""
    files = dict(message.files)
    layout = layout_of(sorted(files))
    named = AdapterFiles(files[layout.config], files[layout.weights], layout)
    return ImportItem(message.adapter_id, named, dict(message.labels) or None, tenant(message, "tenant"))


def import_result(result: ImportResult) -> pb.ImportResult:
    message = pb.ImportResult(
        adapter_id=result.adapter_id[:256], outcome=_OUTCOMES[result.outcome], digest=result.digest
    )
    if result.error is not None:
        message.error.CopyFrom(to_status(result.error))
    return message


def adapter(store: AdapterStore, record: AdapterRecord) -> pb.Adapter:
    state = _STATES[store.residency_state(record.digest)]
    message = pb.Adapter(
        name=f"adapters/{record.id}",
        uid=record.uid,
        digest=record.digest,
        family=record.family,
        state=pb.Adapter.STATE_QUARANTINED if record.state == "quarantined" else state,
        pinned=record.pinned,
        labels=dict(record.labels),
        size_bytes=record.size_bytes,
        module_count=record.module_count,
        parameter_count=record.parameter_count,
        base_model_name_or_path=record.base_model_name_or_path,
        warnings=record.warnings,
        etag=record.etag,
        versions=record.versions,
        basis=record.basis,
        tenant=record.tenant,
        base_fingerprint=record.base_fingerprint,
    )
    message.create_time.FromDatetime(record.create_time)
    message.update_time.FromDatetime(record.update_time)
    if record.last_used_time is not None:
        message.last_used_time.FromDatetime(record.last_used_time)
    return message


def statistics(usage: Usage) -> pb.AdapterStatistics:
    message = pb.AdapterStatistics(
        name=f"adapters/{usage.adapter_id}/statistics" if usage.adapter_id else "",
        request_count=usage.requests,
        outcome_counts=usage.outcomes,
        error_count=usage.errors,
        prompt_token_count=usage.prompt_tokens,
        generated_token_count=usage.generated_tokens,
        time_to_first_token=_quantiles(usage.first_token),
        inter_token=_quantiles(usage.inter_token),
        total=_quantiles(usage.total),
    )
    times: tuple[datetime | None, datetime | None] = (usage.first_use, usage.last_use)
    for field, time in zip((message.first_use_time, message.last_use_time), times, strict=True):
        if time is not None:
            field.FromDatetime(time)
    return message


def _quantiles(found: Quantiles) -> pb.LatencyQuantiles:
    return pb.LatencyQuantiles(
        count=found.count, p50=_duration(found.p50), p90=_duration(found.p90), p99=_duration(found.p99)
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
