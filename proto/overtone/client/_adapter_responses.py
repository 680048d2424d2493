"""Messages of the control plane to the client's types."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime

from overtone.client import adapter_types as types
from overtone.client._responses import seconds
from overtone.client._status import from_status
from overtone.v1 import adapters_pb2, store_pb2

_STATES: dict[int, str] = {
    adapters_pb2.Adapter.STATE_STORED: "stored",
    adapters_pb2.Adapter.STATE_LOADING: "loading",
    adapters_pb2.Adapter.STATE_RESIDENT: "resident",
    adapters_pb2.Adapter.STATE_QUARANTINED: "quarantined",
}
_KINDS: dict[int, types.EventKind] = {
    adapters_pb2.AdapterEvent.KIND_CREATED: "created",
    adapters_pb2.AdapterEvent.KIND_UPDATED: "updated",
    adapters_pb2.AdapterEvent.KIND_DELETED: "deleted",
    adapters_pb2.AdapterEvent.KIND_EXISTING: "existing",
}
_OUTCOMES: dict[int, types.ImportOutcome] = {
    adapters_pb2.ImportResult.OUTCOME_CREATED: "created",
    adapters_pb2.ImportResult.OUTCOME_UPDATED: "updated",
    adapters_pb2.ImportResult.OUTCOME_UNCHANGED: "unchanged",
    adapters_pb2.ImportResult.OUTCOME_REFUSED: "refused",
}


def adapter(message: adapters_pb2.Adapter) -> types.Adapter:
    return types.Adapter(
        id=message.name.removeprefix("adapters/"),
        uid=message.uid,
        digest=message.digest,
        family=message.family,
        state=_STATES.get(message.state, "unspecified"),
        pinned=message.pinned,
        labels=dict(message.labels),
        size_bytes=message.size_bytes,
        module_count=message.module_count,
        parameter_count=message.parameter_count,
        base_model_name_or_path=message.base_model_name_or_path,
        warnings=list(message.warnings),
        create_time=_time(message, "create_time"),
        update_time=_time(message, "update_time"),
        etag=message.etag,
        versions=list(message.versions),
        basis=message.basis,
        tenant=message.tenant,
        last_used_time=_time(message, "last_used_time"),
        base_fingerprint=message.base_fingerprint,
    )


def deletion(message: adapters_pb2.DeleteAdapterResponse) -> types.Deletion:
    return types.Deletion(message.freed_bytes, message.pending_bytes, message.lease_count)


def watch_update(message: adapters_pb2.WatchAdaptersResponse) -> types.WatchUpdate:
    return types.WatchUpdate([_event(each) for each in message.events], message.resume_token, message.caught_up)


def _event(message: adapters_pb2.AdapterEvent) -> types.AdapterEvent:
    kind = _KINDS.get(message.kind, "unspecified")
    found = adapter(message.adapter)
    return types.AdapterEvent(kind, found.id, None if kind == "deleted" else found)


def import_result(message: adapters_pb2.ImportResult) -> types.ImportResult:
    return types.ImportResult(
        message.adapter_id,
        _OUTCOMES.get(message.outcome, "unspecified"),
        message.digest,
        from_status(message.error) if message.HasField("error") else None,
    )


def statistics(message: adapters_pb2.AdapterStatistics) -> types.AdapterStatistics:
    return types.AdapterStatistics(
        id=message.name.removeprefix("adapters/").removesuffix("/statistics"),
        request_count=message.request_count,
        outcome_counts=dict(message.outcome_counts),
        error_count=message.error_count,
        prompt_token_count=message.prompt_token_count,
        generated_token_count=message.generated_token_count,
        first_use_time=_time(message, "first_use_time"),
        last_use_time=_time(message, "last_use_time"),
        time_to_first_token=_quantiles(message.time_to_first_token),
        inter_token=_quantiles(message.inter_token),
        total=_quantiles(message.total),
    )


def top(message: adapters_pb2.ListAdapterStatisticsResponse) -> types.TopAdapters:
    return types.TopAdapters(
        [statistics(each) for each in message.statistics],
        message.tracked_count,
        message.folded_count,
        statistics(message.other),
    )


def store_statistics(message: store_pb2.StoreStatistics) -> types.StoreStatistics:
    return types.StoreStatistics(**{each.name: getattr(message, each.name) for each in fields(types.StoreStatistics)})


def compaction(message: store_pb2.Compaction) -> types.Compaction:
    return types.Compaction(message.pack_count, message.moved_bytes, message.freed_bytes, check(message.check))


def check(message: store_pb2.Check) -> types.Check:
    problems = [types.Problem(each.kind, each.digest, each.pack, each.message) for each in message.problems]
    return types.Check(message.problem_count, problems)


def _quantiles(message: adapters_pb2.LatencyQuantiles) -> types.Quantiles:
    return types.Quantiles(message.count, seconds(message.p50), seconds(message.p90), seconds(message.p99))


def _time(message: adapters_pb2.Adapter | adapters_pb2.AdapterStatistics, name: str) -> datetime | None:
    """None if it is not set."""
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    found: datetime = getattr(message, name).ToDatetime(tzinfo=UTC)
    return found
