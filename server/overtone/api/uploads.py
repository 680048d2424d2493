"""UploadAdapter: the files of one adapter, in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial

from overtone.adapters.store import Upload
from overtone.api import resources
from overtone.api.backend import Backend
from overtone.api.change_log import Change, ChangeLog
from overtone.api.long_work import to_its_end
from overtone.api.status import Context
from overtone.errors import DeadlineExceeded, InvalidRequest, Overloaded, TooLarge
from overtone.v1 import adapters_pb2 as pb

MAX_UPLOADS = 16
MAX_CHUNK_BYTES = 1 << 20
SILENCE_S = 60.0
_TURNS = 5

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
            with ExitStack() as line:
                change = line.enter_context(self._log.change("UploadAdapter", context, first.header.adapter_id))
                upload = await self._received(backend, messages, change)
                return await to_its_end(self._commit(backend, upload, first.header, change, line.pop_all()))

    async def _received(self, backend: Backend, messages: Messages, change: Change) -> Upload:
        upload, received = backend.store.begin_upload(), 0
        try:
            while (message := await _next_message(messages)) is not None:
                chunk = _chunk(message)
                write = partial(upload.write, chunk.file_name, chunk.data)
                if upload.quick(len(chunk.data)):
                    write()  # each way to a thread and back waits for the event loop's turn
                else:
                    await to_its_end(backend.in_store(write))
                received += len(chunk.data)
            # A client that leaves looks like one that has sent all, until a moment later its call is cancelled.
            for _ in range(_TURNS):
                await asyncio.sleep(0)
        except BaseException:
            await to_its_end(_end(backend, upload))
            raise
        change.fields["received_bytes"] = received
        return upload

    async def _commit(
        self, backend: Backend, upload: Upload, header: pb.UploadHeader, change: Change, line: ExitStack
    ) -> pb.Adapter:
        """line: what writes the change down once it is left."""
        with line:
            try:
                options = resources.options(header.options)
                commit = partial(backend.store.commit_upload, upload, header.adapter_id, **options)
                record = await backend.in_store(commit)
            finally:
                await _end(backend, upload)
            change.stored(record)
        return resources.adapter(backend.store, record)


async def _end(backend: Backend, upload: Upload) -> None:
    if upload.quick(0):
        upload.abort()
    else:
        await backend.in_store(upload.abort)


async def _next_message(messages: Messages) -> pb.UploadAdapterRequest | None:
    """None at the end. A client that opens an upload and falls silent does not keep its place."""
    try:
        async with asyncio.timeout(SILENCE_S):  # not wait_for, which loses a cancellation that comes with the message
            return await anext(messages, None)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the upload was silent for {SILENCE_S:g} s") from error


def _chunk(message: pb.UploadAdapterRequest) -> pb.FileChunk:
    if message.WhichOneof("part") != "chunk":
        raise InvalidRequest("after its header an upload has only chunks", field="chunk")
    if len(message.chunk.data) > MAX_CHUNK_BYTES:
        raise TooLarge(f"a chunk has {len(message.chunk.data)} bytes, at most {MAX_CHUNK_BYTES}", field="chunk.data")
    return message.chunk
