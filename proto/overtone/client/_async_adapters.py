"""`AsyncClient.adapters`: as `AdapterClient`, with await."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar, Unpack

import grpc.aio

from overtone.client import _adapter_requests as requests
from overtone.client import _adapter_responses as responses
from overtone.client import _imports
from overtone.client import adapter_types as types
from overtone.client._adapter_requests import LoadOptions
from overtone.client._channel import Metadata
from overtone.client._folder import upload_messages
from overtone.client._status import typed_errors
from overtone.v1 import adapters_pb2, adapters_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncAdapterClient:
    """Adapters come, change and go while others stream. `etag`: change it only if nobody else did since.

    What is iterated with `async for` ends its call when it is closed: see `AsyncClient.stream`.
    """

    def __init__(
        self, stub: adapters_pb2_grpc.AdapterServiceAsyncStub, timeout: float | None, metadata: Metadata
    ) -> None:
        self._stub = stub
        self._timeout = timeout
        self._metadata = metadata

    async def load(self, folder: str | PathLike[str], id: str, **options: Unpack[LoadOptions]) -> types.Adapter:
        """Uploads an adapter's folder from this machine. When it returns, the next request may name the adapter.

        Options: see `LoadOptions`.
        """
        messages = _off_loop(upload_messages(Path(folder), id, requests.adapter_options(options)))
        with typed_errors():
            reply = await self._stub.UploadAdapter(messages, timeout=self._timeout, metadata=self._metadata)
        return responses.adapter(reply)

    async def load_from_server(self, path: str, id: str, **options: Unpack[LoadOptions]) -> types.Adapter:
        """The same from a folder on the server, relative to one of its `--adapter-root` directories."""
        message = requests.adapter_options(options)
        request = adapters_pb2.LoadAdapterRequest(adapter_id=requests.bare_id(id), path=path, options=message)
        return responses.adapter(await self._call(self._stub.LoadAdapter, request))

    def import_many(self, entries: Iterable[types.ImportEntry]) -> AsyncGenerator[types.ImportResult, None]:
        """Uploads many small adapters. One result for each, in their order, once it is stored; one that is refused stops
        nobody. Entries are taken, a few hundred ahead, in other threads, when iteration begins. No time limit."""
        return _imports.run_async(self._stub, entries, self._metadata)

    async def list(
        self, page_size: int = 0, *, filter: str = "", order_by: str = ""
    ) -> AsyncGenerator[types.Adapter, None]:
        """Adapters by id; pages are fetched as the iteration reaches them. Arguments: see `AdapterClient.list`."""
        token = ""
        while True:
            request = requests.list_request(page_size, token, filter, order_by)
            page = await self._call(self._stub.ListAdapters, request)
            for message in page.adapters:
                yield responses.adapter(message)
            token = page.next_page_token
            if not token:
                return

    async def get(self, id: str) -> types.Adapter:
        request = adapters_pb2.GetAdapterRequest(name=requests.adapter_name(id))
        return responses.adapter(await self._call(self._stub.GetAdapter, request))

    async def watch(
        self, *, resume_token: str | None = None, snapshot: bool = False
    ) -> AsyncGenerator[types.WatchUpdate, None]:
        """Changes as they happen; see `AdapterClient.watch`."""
        call = self._stub.WatchAdapters(requests.watch_request(resume_token, snapshot), metadata=self._metadata)
        try:
            with typed_errors():
                async for message in call:
                    yield responses.watch_update(message)
        finally:
            call.cancel()

    async def pin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        """Keeps the adapter in memory whatever else is used."""
        return await self._update(requests.pin_request(id, True, etag))

    async def unpin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        return await self._update(requests.pin_request(id, False, etag))

    async def label(self, id: str, labels: Mapping[str, str], *, etag: str | None = None) -> types.Adapter:
        """Replaces all labels."""
        return await self._update(requests.label_request(id, labels, etag))

    async def activate(self, id: str, version: str | None = None, *, etag: str | None = None) -> types.Adapter:
        """Makes a version in `Adapter.versions` (12 digits of its digest or more) the current one; None: the one before."""
        request = requests.activate_request(id, version, etag)
        return responses.adapter(await self._call(self._stub.ActivateAdapterVersion, request))

    async def delete(self, id: str, *, etag: str | None = None) -> types.Deletion:
        """Deletes the adapter with all its versions; running requests finish."""
        return responses.deletion(await self._call(self._stub.DeleteAdapter, requests.delete_request(id, etag)))

    async def export(self, ids: Iterable[str]) -> AsyncGenerator[bytes, None]:
        """The bytes of a tar archive of adapters: canonical blobs and a manifest. No time limit."""
        call = self._stub.ExportAdapters(requests.export_request(ids), metadata=self._metadata)
        try:
            with typed_errors():
                async for message in call:
                    yield message.data
        finally:
            call.cancel()

    async def statistics(self, id: str) -> types.AdapterStatistics:
        """How an adapter was used since the server started; zeros if it was not."""
        request = requests.statistics_request(id)
        return responses.statistics(await self._call(self._stub.GetAdapterStatistics, request))

    async def top(self, count: int = 20, order_by: str = "request_count desc") -> types.TopAdapters:
        """The statistics of the first adapters of an order; see `AdapterClient.top`."""
        request = requests.top_request(count, order_by)
        return responses.top(await self._call(self._stub.ListAdapterStatistics, request))

    async def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> types.Adapter:
        return responses.adapter(await self._call(self._stub.UpdateAdapter, request))

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with typed_errors():
            return await method(request, timeout=self._timeout, metadata=self._metadata)


async def _off_loop(
    messages: Iterator[adapters_pb2.UploadAdapterRequest],
) -> AsyncGenerator[adapters_pb2.UploadAdapterRequest, None]:
    """Reads the files in a worker thread: other calls of this event loop go on."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
