"""`Client.adapters`: the control plane, blocking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar

import grpc

from overtone.client import _requests, _responses, types
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

    def load(
        self,
        folder: str | PathLike[str],
        id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> types.Adapter:
        """Uploads an adapter's folder from this machine. When it returns, the next request may name the adapter."""
        options = _requests.adapter_options(pinned, labels, create_only, validate_only)
        messages = upload_messages(Path(folder), id, options)
        with typed_errors():
            reply = self._stub.UploadAdapter(messages, timeout=self._timeout, metadata=self._metadata)
        return _responses.adapter(reply)

    def load_from_server(
        self,
        path: str,
        id: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        create_only: bool = False,
        validate_only: bool = False,
    ) -> types.Adapter:
        """The same from a folder on the server, relative to one of its `--adapter-root` directories."""
        options = _requests.adapter_options(pinned, labels, create_only, validate_only)
        request = adapters_pb2.LoadAdapterRequest(adapter_id=_requests.bare_id(id), path=path, options=options)
        return _responses.adapter(self._call(self._stub.LoadAdapter, request))

    def list(self, page_size: int = 0) -> Iterator[types.Adapter]:
        """All adapters by id; pages are fetched as the iteration reaches them. page_size 0: the server's choice."""
        token = ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=page_size, page_token=token)
            page = self._call(self._stub.ListAdapters, request)
            yield from map(_responses.adapter, page.adapters)
            token = page.next_page_token
            if not token:
                return

    def get(self, id: str) -> types.Adapter:
        request = adapters_pb2.GetAdapterRequest(name=_requests.adapter_name(id))
        return _responses.adapter(self._call(self._stub.GetAdapter, request))

    def pin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        """Keeps the adapter in memory whatever else is used."""
        return self._update(_requests.pin_request(id, True, etag))

    def unpin(self, id: str, *, etag: str | None = None) -> types.Adapter:
        return self._update(_requests.pin_request(id, False, etag))

    def label(self, id: str, labels: Mapping[str, str], *, etag: str | None = None) -> types.Adapter:
        """Replaces all labels."""
        return self._update(_requests.label_request(id, labels, etag))

    def delete(self, id: str, *, etag: str | None = None) -> None:
        """Deletes the adapter with all its versions; running requests finish."""
        request = adapters_pb2.DeleteAdapterRequest(name=_requests.adapter_name(id), etag=etag or "")
        self._call(self._stub.DeleteAdapter, request)

    def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> types.Adapter:
        return _responses.adapter(self._call(self._stub.UpdateAdapter, request))

    def _call(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request) -> _Response:
        with typed_errors():
            return method(request, timeout=self._timeout, metadata=self._metadata)
