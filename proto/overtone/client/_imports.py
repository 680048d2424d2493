"""An import's call: a few batches on their way at once, and a sign of life while entries do not come."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from queue import Empty, SimpleQueue

from overtone.client._batches import Batch, batches
from overtone.client._channel import Metadata
from overtone.client._status import typed_errors
from overtone.client.adapter_types import ImportEntry, ImportResult
from overtone.v1 import adapters_pb2, adapters_pb2_grpc

IN_FLIGHT = 3
SIGN_S = 60.0
"""After so long without entries an empty batch says that the import goes on: the server ends one that is silent."""


class _Reader:
    """Takes batches from the entries in a thread of its own, each once it is asked for."""

    def __init__(self, entries: Iterable[ImportEntry]) -> None:
        self._asked, self._taken = SimpleQueue[bool](), SimpleQueue[Batch | None]()
        self.failed: Exception | None = None
        """What the entries raised; then there is no further batch."""
        threading.Thread(target=self._run, args=(batches(entries),), name="overtone-import", daemon=True).start()

    def _run(self, waiting: Iterator[Batch]) -> None:
        while self._asked.get():
            batch = None
            try:
                batch = next(waiting, None)
            except Exception as error:
                self.failed = error
            self._taken.put(batch)

    def take(self) -> Iterator[Batch | None]:
        """The next batch, None at the end; an empty one before it whenever it does not come for `SIGN_S`."""
        self._asked.put(True)
        while True:
            try:
                yield self._taken.get(timeout=SIGN_S)
                return
            except Empty:
                yield Batch()

    def first(self) -> Batch | None:
        self._asked.put(True)
        return self._taken.get()

    def close(self) -> None:
        self._asked.put(False)
        self._taken.put(None)


def run(
    stub: adapters_pb2_grpc.AdapterServiceStub, entries: Iterable[ImportEntry], metadata: Metadata
) -> Iterator[ImportResult]:
    reader = _Reader(entries)
    try:
        # Before the call, which the server ends after some minutes of silence: it may take longer to find the first entry
        # that an interrupted import has not sent.
        first = reader.first()
        if first is not None:
            yield from _called(stub, first, reader, metadata)
    finally:
        reader.close()
    if reader.failed is not None:
        raise reader.failed


def _called(
    stub: adapters_pb2_grpc.AdapterServiceStub, first: Batch, reader: _Reader, metadata: Metadata
) -> Iterator[ImportResult]:
    window, left = threading.Semaphore(IN_FLIGHT), threading.Event()
    sent: deque[Batch] = deque()

    def messages() -> Iterator[adapters_pb2.ImportAdaptersRequest]:
        """In a thread of gRPC's."""
        taken: Iterator[Batch | None] = iter((first,))
        while True:
            for batch in taken:
                if batch is None:
                    return
                window.acquire()
                if left.is_set():
                    return
                sent.append(batch)
                yield batch.message()
            taken = reader.take()

    with typed_errors():
        call = stub.ImportAdapters(messages(), metadata=metadata)
        try:
            for response in call:
                yield from sent.popleft().results(response)
                window.release()
        finally:
            left.set()
            window.release()
            call.cancel()


async def run_async(
    stub: adapters_pb2_grpc.AdapterServiceAsyncStub, entries: Iterable[ImportEntry], metadata: Metadata
) -> AsyncGenerator[ImportResult, None]:
    """As `run`; entries are read in worker threads: other calls of this event loop go on."""
    waiting, failed = batches(entries), list[Exception]()

    async def read() -> Batch | None:
        try:
            return await asyncio.to_thread(next, waiting, None)
        except Exception as error:
            failed.append(error)
            return None

    first = await read()
    if first is not None:
        async with aclosing(_called_async(stub, first, read, metadata)) as results:
            async for result in results:
                yield result
    if failed:
        raise failed[0]


async def _called_async(
    stub: adapters_pb2_grpc.AdapterServiceAsyncStub,
    first: Batch,
    read: Callable[[], Coroutine[None, None, Batch | None]],
    metadata: Metadata,
) -> AsyncGenerator[ImportResult, None]:
    window, sent = asyncio.Semaphore(IN_FLIGHT), deque[Batch]()

    async def messages() -> AsyncGenerator[adapters_pb2.ImportAdaptersRequest, None]:
        batch: Batch | None = first
        while batch is not None:
            await window.acquire()
            sent.append(batch)
            yield batch.message()
            reading = asyncio.ensure_future(read())
            while not (await asyncio.wait({reading}, timeout=SIGN_S))[0]:
                await window.acquire()
                sent.append(Batch())
                yield adapters_pb2.ImportAdaptersRequest()
            batch = reading.result()

    call = stub.ImportAdapters(messages(), metadata=metadata)
    try:
        with typed_errors():
            async for response in call:
                for result in sent.popleft().results(response):
                    yield result
                window.release()
    finally:
        call.cancel()
