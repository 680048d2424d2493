"""AdapterService: the store's operations, each in a thread so that streams never wait for a disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from overtone.adapters.store import AdapterStore
from overtone.api import resources
from overtone.api.backend import BackendSlot
from overtone.api.change_log import ChangeLog
from overtone.api.exports import Exports
from overtone.api.imports import Imports
from overtone.api.long_work import uninterrupted
from overtone.api.resources import adapter_id
from overtone.api.statistics_service import get_statistics, list_statistics
from overtone.api.status import Context
from overtone.api.uploads import Uploads
from overtone.api.watch import Watches
from overtone.errors import InvalidRequest
from overtone.v1 import adapters_pb2 as pb
from overtone.v1 import adapters_pb2_grpc as pb_grpc

_UPDATABLE = frozenset({"pinned", "labels"})


class AdapterService(pb_grpc.AdapterServiceServicer):
    """The control plane. Errors leave as exceptions of `overtone.errors`; the interceptor makes them a status."""

    def __init__(self, backend: BackendSlot, log: ChangeLog, watches: Watches) -> None:
        self._backend, self._log, self._watches = backend, log, watches
        self._uploads, self._imports, self._exports = Uploads(log), Imports(log), Exports(log)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.Adapter:
        return await self._uploads.run(self._backend.changing(), request_iterator, context)

    @uninterrupted
    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.Adapter:
        backend = self._backend.changing()
        with self._log.change("LoadAdapter", context, request.adapter_id) as change:
            options = resources.options(request.options)
            load = partial(backend.store.load_folder, request.path, request.adapter_id, **options)
            record = await backend.in_store(load)
            change.stored(record)
        return resources.adapter(backend.store, record)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:
        backend = self._backend.get()
        record = await backend.in_store(partial(backend.store.get, adapter_id(request.name)))
        return resources.adapter(backend.store, record)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        backend = self._backend.get()
        return await backend.in_store(partial(_page, backend.store, request))

    @uninterrupted
    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.Adapter:
        backend, adapter = self._backend.changing(), request.adapter
        with self._log.change("UpdateAdapter", context, adapter.name) as change:
            paths = _paths(request)
            update = partial(
                backend.store.update,
                adapter_id(adapter.name, "adapter.name"),
                pinned=adapter.pinned if "pinned" in paths else None,
                labels=dict(adapter.labels) if "labels" in paths else None,
                etag=adapter.etag,
            )
            record = await backend.in_store(update)
            change.fields["changed"] = ",".join(sorted(paths))
        return resources.adapter(backend.store, record)

    @uninterrupted
    async def ActivateAdapterVersion(self, request: pb.ActivateAdapterVersionRequest, context: Context) -> pb.Adapter:
        backend = self._backend.changing()
        with self._log.change("ActivateAdapterVersion", context, request.name) as change:
            name = adapter_id(request.name)
            record = await backend.in_store(partial(backend.store.activate, name, request.version, etag=request.etag))
            change.stored(record)
        return resources.adapter(backend.store, record)

    @uninterrupted
    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:
        backend = self._backend.changing()
        with self._log.change("DeleteAdapter", context, request.name) as change:
            name = adapter_id(request.name)
            gone = await backend.in_store(partial(backend.store.delete, name, etag=request.etag))
            change.fields |= {"bytes": gone.freed_bytes, "pending_bytes": gone.pending_bytes, "leases": gone.leases}
        return pb.DeleteAdapterResponse(
            freed_bytes=gone.freed_bytes, pending_bytes=gone.pending_bytes, lease_count=gone.leases
        )

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        async with aclosing(self._watches.run(self._backend.changing(), request)) as responses:
            async for response in responses:
                yield response

    async def ImportAdapters(
        self, request_iterator: AsyncIterator[pb.ImportAdaptersRequest], context: Context
    ) -> AsyncIterator[pb.ImportAdaptersResponse]:
        async with aclosing(self._imports.run(self._backend.changing(), request_iterator, context)) as responses:
            async for response in responses:
                yield response

    async def ExportAdapters(
        self, request: pb.ExportAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.ExportAdaptersResponse]:
        async with aclosing(self._exports.run(self._backend.changing(), request, context)) as responses:
            async for response in responses:
                yield response

    async def GetAdapterStatistics(
        self, request: pb.GetAdapterStatisticsRequest, context: Context
    ) -> pb.AdapterStatistics:
        return await get_statistics(self._backend.get(), request)

    async def ListAdapterStatistics(
        self, request: pb.ListAdapterStatisticsRequest, context: Context
    ) -> pb.ListAdapterStatisticsResponse:
        return await list_statistics(self._backend.get(), request)


def _page(store: AdapterStore, request: pb.ListAdaptersRequest) -> pb.ListAdaptersResponse:
    records, token = store.list(request.page_size, request.page_token, request.filter, request.order_by)
    # Up to a thousand messages: not on the event loop, where tokens would wait for them.
    return pb.ListAdaptersResponse(adapters=[resources.adapter(store, each) for each in records], next_page_token=token)


def _paths(request: pb.UpdateAdapterRequest) -> set[str]:
    """Which fields change."""
    paths = set(request.update_mask.paths) or set(_UPDATABLE)
    if unknown := sorted(paths - _UPDATABLE):
        raise InvalidRequest(
            f"update_mask names {unknown[0][:100]!r}; only pinned and labels can be changed", field="update_mask"
        )
    return paths
