"""Python arguments to the messages of the control plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

from google.protobuf.field_mask_pb2 import FieldMask

from overtone.v1 import adapters_pb2


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load` and `load_from_server`."""

    pinned: bool | None
    """Keep it in memory; None: as it is."""
    labels: Mapping[str, str] | None
    """Replaces all labels; None: as they are."""
    tenant: str | None
    """Whose it is: requests of other tenants do not find it; "": everybody's; None: as it is."""
    create_only: bool
    """Refuse if the id exists."""
    validate_only: bool
    """Check everything, store nothing."""


def adapter_options(options: LoadOptions) -> adapters_pb2.AdapterOptions:
    if unknown := options.keys() - LoadOptions.__optional_keys__:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
    return adapters_pb2.AdapterOptions(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]


def list_request(page_size: int, page_token: str, filter: str, order_by: str) -> adapters_pb2.ListAdaptersRequest:
    return adapters_pb2.ListAdaptersRequest(
        page_size=page_size, page_token=page_token, filter=filter, order_by=order_by
    )


def activate_request(
    adapter_id: str, version: str | None, etag: str | None
) -> adapters_pb2.ActivateAdapterVersionRequest:
    return adapters_pb2.ActivateAdapterVersionRequest(
        name=adapter_name(adapter_id), version=version or "", etag=etag or ""
    )


def delete_request(adapter_id: str, etag: str | None) -> adapters_pb2.DeleteAdapterRequest:
    return adapters_pb2.DeleteAdapterRequest(name=adapter_name(adapter_id), etag=etag or "")


def watch_request(resume_token: str | None, snapshot: bool) -> adapters_pb2.WatchAdaptersRequest:
    return adapters_pb2.WatchAdaptersRequest(resume_token=resume_token or "", snapshot=snapshot)


def export_request(adapter_ids: Iterable[str]) -> adapters_pb2.ExportAdaptersRequest:
    return adapters_pb2.ExportAdaptersRequest(names=map(adapter_name, adapter_ids))


def statistics_request(adapter_id: str) -> adapters_pb2.GetAdapterStatisticsRequest:
    return adapters_pb2.GetAdapterStatisticsRequest(name=f"{adapter_name(adapter_id)}/statistics")


def top_request(count: int, order_by: str) -> adapters_pb2.ListAdapterStatisticsRequest:
    return adapters_pb2.ListAdapterStatisticsRequest(page_size=count, order_by=order_by)


def pin_request(adapter_id: str, pinned: bool, etag: str | None) -> adapters_pb2.UpdateAdapterRequest:
    adapter = adapters_pb2.Adapter(name=adapter_name(adapter_id), pinned=pinned, etag=etag or "")
    return adapters_pb2.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=["pinned"]))


def label_request(adapter_id: str, labels: Mapping[str, str], etag: str | None) -> adapters_pb2.UpdateAdapterRequest:
    adapter = adapters_pb2.Adapter(name=adapter_name(adapter_id), labels=labels, etag=etag or "")
    return adapters_pb2.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=["labels"]))


def adapter_name(adapter_id: str) -> str:
    """The resource name; an id that already is one stays."""
    return adapter_id if adapter_id.startswith("adapters/") else f"adapters/{adapter_id}"


def bare_id(adapter_id: str) -> str:
    return adapter_id.removeprefix("adapters/")
