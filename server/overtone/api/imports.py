"""ImportAdapters: batches of adapters in, what became of each out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial

from overtone.adapters.operations import ImportItem, ImportResult
from overtone.adapters.store import AdapterStore
from overtone.api import resources
from overtone.api.backend import Backend
from overtone.api.change_log import ChangeLog
from overtone.api.long_work import to_its_end
from overtone.api.status import Context
from overtone.errors import DeadlineExceeded, InvalidRequest, Overloaded, OvertoneError, TooLarge
from overtone.v1 import adapters_pb2 as pb

MAX_IMPORTS = 4
MAX_BATCH = 1000
MAX_BATCH_BYTES = 8 << 20
AHEAD = 2
"""Batches that are read while one is being stored."""
SILENCE_S = 300.0

Messages = AsyncIterator[pb.ImportAdaptersRequest]


class Imports:
    """All imports of a server. A client has at most `AHEAD` + 1 batches in the server's memory: HTTP/2's flow control
    holds back what it sends beyond."""

    def __init__(self, log: ChangeLog) -> None:
        self._log = log
        self._streams = asyncio.Semaphore(MAX_IMPORTS)

    async def run(
        self, backend: Backend, messages: Messages, context: Context
    ) -> AsyncGenerator[pb.ImportAdaptersResponse, None]:
        """One response for each batch. Raises `StoreFailed` if the store cannot go on, and what a batch is refused for as a
        whole; the batches before are answered then."""
        if self._streams.locked():
            raise Overloaded(f"{MAX_IMPORTS} imports are under way already", retry_after_s=5.0)
        async with self._streams:
            batches, room = asyncio.Queue[pb.ImportAdaptersRequest | None](), asyncio.Semaphore(1 + AHEAD)
            reader = asyncio.create_task(_read(messages, batches, room))

            def at_the_end(task: asyncio.Task[None]) -> None:
                if not task.cancelled():
                    task.exception()  # the client may be gone
                batches.put_nowait(None)

            reader.add_done_callback(at_the_end)
            try:
                while (batch := await batches.get()) is not None:
                    yield await to_its_end(self._store(backend, batch, context))
                    room.release()
                await reader
            finally:
                reader.cancel()

    async def _store(
        self, backend: Backend, batch: pb.ImportAdaptersRequest, context: Context
    ) -> pb.ImportAdaptersResponse:
        if not batch.adapters:  # a client's sign of life
            return pb.ImportAdaptersResponse()
        with self._log.change("ImportAdapters", context) as change:
            response, summary = await backend.in_import(partial(_stored, backend.store, batch))
            change.fields |= summary
            return response


async def _read(
    messages: Messages, batches: asyncio.Queue[pb.ImportAdaptersRequest | None], room: asyncio.Semaphore
) -> None:
    """To the end of the messages, a batch whenever there is room for one."""
    while True:
        await room.acquire()
        try:
            batch = await asyncio.wait_for(anext(messages, None), SILENCE_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the import was silent for {SILENCE_S:g} s") from error
        if batch is None:
            return
        _check(batch)
        batches.put_nowait(batch)


def _check(batch: pb.ImportAdaptersRequest) -> None:
    if len(batch.adapters) > MAX_BATCH:
        raise InvalidRequest(f"a batch has {len(batch.adapters)} adapters, at most {MAX_BATCH}", field="adapters")
    size = _size(batch)
    if size > MAX_BATCH_BYTES:
        raise TooLarge(f"a batch has {size} bytes of files, at most {MAX_BATCH_BYTES}", field="adapters")


def _size(batch: pb.ImportAdaptersRequest) -> int:
    return sum(len(data) for item in batch.adapters for data in item.files.values())


def _stored(
    store: AdapterStore, batch: pb.ImportAdaptersRequest
) -> tuple[pb.ImportAdaptersResponse, dict[str, object]]:
    """What became of a batch, for the client and for the log."""
    results = _results(store, batch.adapters)
    return pb.ImportAdaptersResponse(results=map(resources.import_result, results)), _summary(batch, results)


def _results(store: AdapterStore, messages: Sequence[pb.ImportItem]) -> list[ImportResult]:
    """The sound ones by one call of the store; results in the order of the messages."""
    results: dict[int, ImportResult] = {}
    items: dict[int, ImportItem] = {}
    seen: set[str] = set()
    for index, message in enumerate(messages):
        try:
            if message.adapter_id in seen:
                raise InvalidRequest("the id appears twice in one batch", field="adapter_id")
            seen.add(message.adapter_id)
            items[index] = resources.import_item(message)
        except OvertoneError as error:
            results[index] = ImportResult(message.adapter_id, "", "refused", error)
    results |= dict(zip(items, store.import_many(list(items.values())), strict=True))
    return [results[index] for index in range(len(messages))]


def _summary(batch: pb.ImportAdaptersRequest, results: Sequence[ImportResult]) -> dict[str, object]:
    reasons = Counter(result.error.reason for result in results if result.error is not None)
    return {
        "adapters": len(results),
        "bytes": _size(batch),
        **Counter(result.outcome for result in results),
        **({"reasons": dict(reasons)} if reasons else {}),
    }
