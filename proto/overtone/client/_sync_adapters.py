"""`Client.adapters`: the control plane, blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar, Unpack

import grpc

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


class AdapterClient:
    """Adapters come, change and go while others stream. `etag`: change it only if nobody else did since."""

    def __init__(self, stub: adapters_pb2_grpc.AdapterServiceStub, timeout: float | None, metadata: Metadata) -> None:
        self._stub = stub
        self._timeout = timeout
        self._metadata = metadata

    def load(self, folder: str | PathLike[str], id: str, **options: Unpack[LoadOptions]) -> types.Adapter:
        """Uploads an adapter's folder from this machine. When it returns, the next request may name the adapter.

        Options: see `LoadOptions`.
        """
        messages = upload_messages(Path(folder), id, requests.adapter_options(options))
        with typed_errors():
            reply = self._stub.UploadAdapter(messages, timeout=self._timeout, metadata=self._metadata)
        return responses.adapter(reply)

    def load_from_server(self, path: str, id: str, **options: Unpack[LoadOptions]) -> types.Adapter:
        """The same from a folder on the server, relative to one of its `--adapter-root` directories."""
        message = requests.adapter_options(options)
        request = adapters_pb2.LoadAdapterRequest(adapter_id=requests.bare_id(id), path=path, options=message)
        return responses.adapter(self._call(self._stub.LoadAdapter, request))

    def import_many(self, entries: Iterable[types.ImportEntry]) -> Iterator[types.ImportResult]:
        """Uploads many small adapters. One result for each, in their order, once it is stored; one that is refused stops
        nobody. Entries are taken, a few hundred ahead, in another thread, when iteration begins. No time limit."""
        return _imports.run(self._stub, entries, self._metadata)

    def list(self, page_size: int = 0, *, filter: str = "", order_by: str = "") -> Iterator[types.Adapter]:
        """Adapters by id; pages are fetched as the iteration reaches them. page_size 0: the server's choice.

        filter: conditions joined by AND, for example 'tenant = "anna" AND labels.team = "blue"'; order_by: for example
        "size_bytes desc". `ListAdaptersRequest` in adapters.proto has all of both.
        """
        token = ""
        while True:
            request = requests.list_request(page_size, token, filter, order_by)
            page = self._call(self._stub.ListAdapters, request)
            yield from map(responses.adapter, page.adapters)
            token = page.next_page_token
            if not token:
                return

    def get(self, id: str) -> types.Adapter:
        request = adapters_pb2.GetAdapterRequest(name=requests.adapter_name(id))
        return responses.adapter(self._call(self._stub.GetAdapter, request))

    def watch(self, *, resume_token: str | None = None, snapshot: bool = False) -> Iterator[types.WatchUpdate]:
        """Changes from now on, from behind those that a token knows, or after all adapters that there are (`snapshot`),
        until the iteration is closed. Raises WatchExpired if it was too slow: watch again, with a snapshot. No time
        limit."""
        call = self._stub.WatchAdapters(requests.watch_request(resume_token, snapshot), metadata=self._metadata)
        try:
            with typed_errors():
                yield from map(responses.watch_update, call)
        finally:
            call.cancel()

    def pin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        """Keeps the adapter in memory whatever else is used."""
        return self._update(requests.pin_request(id, True, etag))

    def unpin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        return self._update(requests.pin_request(id, False, etag))

    def label(self, id: str, labels: Mapping[str, str], *, etag: str | None = None) -> types.Adapter:
        """Replaces all labels."""
        return self._update(requests.label_request(id, labels, etag))

    def activate(self, id: str, version: str | None = None, *, etag: str | None = None) -> types.Adapter:
        """Makes a version in `Adapter.versions` (12 digits of its digest or more) the current one; None: the one before."""
        request = requests.activate_request(id, version, etag)
        return responses.adapter(self._call(self._stub.ActivateAdapterVersion, request))

    def delete(self, id: str, *, etag: str | None = None) -> types.Deletion:
        """Deletes the adapter with all its versions; running requests finish."""
        return responses.deletion(self._call(self._stub.DeleteAdapter, requests.delete_request(id, etag)))

    def export(self, ids: Iterable[str]) -> Iterator[bytes]:
        """The bytes of a tar archive of adapters: canonical blobs and a manifest. No time limit."""
        call = self._stub.ExportAdapters(requests.export_request(ids), metadata=self._metadata)
        try:
            with typed_errors():
                for message in call:
                    yield message.data
        finally:
            call.cancel()

    def statistics(self, id: str) -> types.AdapterStatistics:
        """How an adapter was used since the server started; zeros if it was not."""
        request = requests.statistics_request(id)
        return responses.statistics(self._call(self._stub.GetAdapterStatistics, request))

    def top(self, count: int = 20, order_by: str = "request_count desc") -> types.TopAdapters:
        """The statistics of the first adapters of an order, at most 1000; `ListAdapterStatisticsRequest` in adapters.proto
        has the orders."""
        request = requests.top_request(count, order_by)
        return responses.top(self._call(self._stub.ListAdapterStatistics, request))

    def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> types.Adapter:
        return responses.adapter(self._call(self._stub.UpdateAdapter, request))

    def _call(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request) -> _Response:
        with typed_errors():
            return method(request, timeout=self._timeout, metadata=self._metadata)
