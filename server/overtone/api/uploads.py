"""UploadAdapter: the files of one adapter, in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from overtone.adapters.store import AdapterRecord, Upload
from overtone.api import resources
from overtone.api.backend import Backend
from overtone.api.change_log import Change, ChangeLog
from overtone.api.status import Context
from overtone.errors import DeadlineExceeded, InvalidRequest, Overloaded, TooLarge
from overtone.v1 import adapters_pb2 as pb

MAX_UPLOADS = 16
MAX_CHUNK_BYTES = 1 << 20
SILENCE_S = 60.0

Messages = AsyncIterator[pb.UploadAdapterRequest]


class Uploads:
    """All uploads of a server."""

    def __init__(self, log: ChangeLog) -> None:
        self._log = log
        self._streams = asyncio.Semaphore(MAX_UPLOADS)

    async def run(self, backend: Backend, messages: Messages, context: Context) -> pb.Adapter:
        """Raises what `AdapterStore.commit_upload` raises."""
        if self._streams.locked():
            raise Overloaded(f"{MAX_UPLOADS} uploads are under way already", retry_after_s=1.0)
        async with self._streams:
            messages = aiter(messages)
            first = await _next_message(messages)
            if first is None or first.WhichOneof("part") != "header":
                raise InvalidRequest("the first message of an upload must be its header", field="header")
            with self._log.change("UploadAdapter", context, first.header.adapter_id) as change:
                upload = await backend.begin_upload()
                try:
                    record = await self._receive(backend, upload, first.header, messages, change)
                finally:
                    await backend.in_store(upload.abort)
                change.stored(record)
            return resources.adapter(backend.store, record)

    async def _receive(
        self, backend: Backend, upload: Upload, header: pb.UploadHeader, messages: Messages, change: Change
    ) -> AdapterRecord:
        received = 0
        while (message := await _next_message(messages)) is not None:
            chunk = _chunk(message)
            await backend.in_store(partial(upload.write, chunk.file_name, chunk.data))
            received += len(chunk.data)
        change.fields["received_bytes"] = received
        options = resources.options(header.options)
        return await backend.in_store(partial(backend.store.commit_upload, upload, header.adapter_id, **options))


async def _next_message(messages: Messages) -> pb.UploadAdapterRequest | None:
    """None at the end. A client that opens an upload and falls silent does not keep its place."""
    try:
        return await asyncio.wait_for(anext(messages, None), SILENCE_S)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the upload was silent for {SILENCE_S:g} s") from error


def _chunk(message: pb.UploadAdapterRequest) -> pb.FileChunk:
    if message.WhichOneof("part") != "chunk":
        raise InvalidRequest("after its header an upload has only chunks", field="chunk")
    if len(message.chunk.data) > MAX_CHUNK_BYTES:
        raise TooLarge(f"a chunk has {len(message.chunk.data)} bytes, at most {MAX_CHUNK_BYTES}", field="chunk.data")
    return message.chunk
