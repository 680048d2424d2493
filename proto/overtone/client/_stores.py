"""`Client.store` and `AsyncClient.store`: the store as a whole, and its upkeep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from overtone.client import _adapter_responses as responses
from overtone.client import adapter_types as types
from overtone.client._channel import Metadata
from overtone.client._status import typed_errors
from overtone.errors import Unavailable
from overtone.v1 import store_pb2, store_pb2_grpc

OnProgress: TypeAlias = Callable[[int, int], None]
"""Told (done, total so far) now and then."""


def _nothing(done: int, total: int) -> None:
    pass


class StoreClient:
    """Compaction and checks run beside requests; they have no time limit, and end early if the call is interrupted."""

    def __init__(self, stub: store_pb2_grpc.StoreServiceStub, timeout: float | None, metadata: Metadata) -> None:
        self._stub = stub
        self._timeout = timeout
        self._metadata = metadata

    def statistics(self) -> types.StoreStatistics:
        """What there is on disk and in memory, and how often each tier had what was asked for."""
        request = store_pb2.GetStoreStatisticsRequest()
        with typed_errors():
            reply = self._stub.GetStoreStatistics(request, timeout=self._timeout, metadata=self._metadata)
        return responses.store_statistics(reply)

    def compact(self, on_progress: OnProgress = _nothing) -> types.Compaction:
        """Gives back the disk space of deleted adapters."""
        with typed_errors():
            for message in self._stub.CompactStore(store_pb2.CompactStoreRequest(), metadata=self._metadata):
                if message.HasField("compaction"):
                    return responses.compaction(message.compaction)
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()

    def check(self, *, deep: bool = False, on_progress: OnProgress = _nothing) -> types.Check:
        """Looks for what is missing or damaged; deep: reads every byte."""
        with typed_errors():
            for message in self._stub.CheckStore(store_pb2.CheckStoreRequest(deep=deep), metadata=self._metadata):
                if message.HasField("check"):
                    return responses.check(message.check)
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()

    def backup(self, folder: str, on_progress: OnProgress = _nothing) -> int:
        """Copies the store into a new folder below the server's `--backup-root`. Returns the bytes copied."""
        request = store_pb2.BackupStoreRequest(folder=folder)
        with typed_errors():
            for message in self._stub.BackupStore(request, metadata=self._metadata):
                if message.HasField("backup"):
                    return message.backup.copied_bytes
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()


class AsyncStoreClient:
    """As `StoreClient`, with await."""

    def __init__(self, stub: store_pb2_grpc.StoreServiceAsyncStub, timeout: float | None, metadata: Metadata) -> None:
        self._stub = stub
        self._timeout = timeout
        self._metadata = metadata

    async def statistics(self) -> types.StoreStatistics:
        """What there is on disk and in memory, and how often each tier had what was asked for."""
        request = store_pb2.GetStoreStatisticsRequest()
        with typed_errors():
            reply = await self._stub.GetStoreStatistics(request, timeout=self._timeout, metadata=self._metadata)
        return responses.store_statistics(reply)

    async def compact(self, on_progress: OnProgress = _nothing) -> types.Compaction:
        """Gives back the disk space of deleted adapters."""
        with typed_errors():
            async for message in self._stub.CompactStore(store_pb2.CompactStoreRequest(), metadata=self._metadata):
                if message.HasField("compaction"):
                    return responses.compaction(message.compaction)
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()

    async def check(self, *, deep: bool = False, on_progress: OnProgress = _nothing) -> types.Check:
        """Looks for what is missing or damaged; deep: reads every byte."""
        request = store_pb2.CheckStoreRequest(deep=deep)
        with typed_errors():
            async for message in self._stub.CheckStore(request, metadata=self._metadata):
                if message.HasField("check"):
                    return responses.check(message.check)
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()

    async def backup(self, folder: str, on_progress: OnProgress = _nothing) -> int:
        """Copies the store into a new folder below the server's `--backup-root`. Returns the bytes copied."""
        request = store_pb2.BackupStoreRequest(folder=folder)
        with typed_errors():
            async for message in self._stub.BackupStore(request, metadata=self._metadata):
                if message.HasField("backup"):
                    return message.backup.copied_bytes
                on_progress(message.progress.done, message.progress.total)
        raise _unfinished()


def _unfinished() -> Unavailable:
    return Unavailable("the server ended the call without an answer")
