"""AdapterService: the store's operations, each in a thread so that streams never wait for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import TypedDict

from google.protobuf.empty_pb2 import Empty

from overtone.adapters.store import AdapterRecord
from overtone.api.backend import Backend, BackendSlot
from overtone.api.status import Context
from overtone.errors import DeadlineExceeded, InvalidRequest, Overloaded, TooLarge
from overtone.v1 import adapters_pb2 as pb
from overtone.v1 import adapters_pb2_grpc as pb_grpc

MAX_UPLOADS = 16
MAX_CHUNK_BYTES = 1 << 20
UPLOAD_SILENCE_S = 60.0

_STATES = {
    "stored": pb.Adapter.STATE_STORED,
    "loading": pb.Adapter.STATE_LOADING,
    "resident": pb.Adapter.STATE_RESIDENT,
}
_UPDATABLE = frozenset({"pinned", "labels"})


class _Options(TypedDict):
    pinned: bool | None
    labels: Mapping[str, str] | None
    create_only: bool
    validate_only: bool


class AdapterService(pb_grpc.AdapterServiceServicer):
    """The control plane. Errors leave as exceptions of `overtone.errors`; the interceptor makes them a status."""

    def __init__(self, backend: BackendSlot) -> None:
        self._backend = backend
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.Adapter:
        backend = self._backend.get()
        if self._uploads.locked():
            raise Overloaded(f"{MAX_UPLOADS} uploads are under way already", retry_after_s=1.0)
        async with self._uploads:
            messages = aiter(request_iterator)
            header = await _next_message(messages)
            if header is None or header.WhichOneof("part") != "header":
                raise InvalidRequest("the first message of an upload must be its header", field="header")
            upload = await backend.begin_upload()
            try:
                while (message := await _next_message(messages)) is not None:
                    chunk = _chunk(message)
                    await backend.in_store(partial(upload.write, chunk.file_name, chunk.data))
                options = _options(header.header.options)
                commit = partial(backend.store.commit_upload, upload, header.header.adapter_id, **options)
                return _resource(backend, await backend.in_store(commit))
            finally:
                await backend.in_store(upload.abort)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.Adapter:
        backend = self._backend.get()
        load = partial(backend.store.load_folder, request.path, request.adapter_id, **_options(request.options))
        return _resource(backend, await backend.in_store(load))

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:
        backend = self._backend.get()
        return _resource(backend, await backend.in_store(partial(backend.store.get, adapter_id(request.name))))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        backend = self._backend.get()
        records, token = await backend.in_store(partial(backend.store.list, request.page_size, request.page_token))
        return pb.ListAdaptersResponse(adapters=[_resource(backend, r) for r in records], next_page_token=token)

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.Adapter:
        backend = self._backend.get()
        paths = set(request.update_mask.paths) or set(_UPDATABLE)
        if unknown := sorted(paths - _UPDATABLE):
            raise InvalidRequest(
                f"update_mask names {unknown[0][:100]!r}; only pinned and labels can be changed", field="update_mask"
            )
        adapter = request.adapter
        update = partial(
            backend.store.update,
            adapter_id(adapter.name, "adapter.name"),
            pinned=adapter.pinned if "pinned" in paths else None,
            labels=dict(adapter.labels) if "labels" in paths else None,
            etag=adapter.etag,
        )
        return _resource(backend, await backend.in_store(update))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> Empty:
        backend = self._backend.get()
        await backend.in_store(partial(backend.store.delete, adapter_id(request.name), etag=request.etag))
        return Empty()


async def _next_message(messages: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadAdapterRequest | None:
    """None at the end. A client that opens an upload and falls silent does not keep its place."""
    try:
        return await asyncio.wait_for(anext(messages, None), UPLOAD_SILENCE_S)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the upload was silent for {UPLOAD_SILENCE_S:g} s") from error


def _chunk(message: pb.UploadAdapterRequest) -> pb.FileChunk:
    if message.WhichOneof("part") != "chunk":
        raise InvalidRequest("after its header an upload has only chunks", field="chunk")
    if len(message.chunk.data) > MAX_CHUNK_BYTES:
        raise TooLarge(f"a chunk has {len(message.chunk.data)} bytes, at most {MAX_CHUNK_BYTES}", field="chunk.data")
    return message.chunk


def adapter_id(name: str, field: str = "name") -> str:
    """ "adapters/ID" -> "ID"."""
    collection, slash, identifier = name.partition("/")
    if collection != "adapters" or not slash:
        raise InvalidRequest(f"{field} must look like adapters/ID, not {name[:100]!r}", field=field)
    return identifier


def _options(options: pb.AdapterOptions) -> _Options:
    return {
        "pinned": options.pinned if options.HasField("pinned") else None,
        "labels": dict(options.labels) or None,
        "create_only": options.create_only,
        "validate_only": options.validate_only,
    }


def _resource(backend: Backend, record: AdapterRecord) -> pb.Adapter:
    adapter = pb.Adapter(
        name=f"adapters/{record.id}",
        uid=record.uid,
        digest=record.digest,
        family=record.family,
        state=_STATES[backend.store.residency_state(record.digest)],
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
    )
    adapter.create_time.FromDatetime(record.create_time)
    adapter.update_time.FromDatetime(record.update_time)
    return adapter
