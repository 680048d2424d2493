"""The asyncio client: as `Client`, with await."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from overtone.client import _channel, _requests, _responses, types
from overtone.client._async_adapters import AsyncAdapterClient
from overtone.client._requests import GenerateOptions, Messages
from overtone.client._status import from_rpc, typed_errors
from overtone.client._stores import AsyncStoreClient
from overtone.errors import DeadlineExceeded
from overtone.v1 import adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, store_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """Talks to one server from one event loop; an async context manager. Arguments: see `Client`."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = 300.0,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Iterable[tuple[str, str | bytes]] = (),
    ) -> None:
        self._timeout = timeout
        self._metadata = _channel.metadata_of(metadata)
        options = _channel.options(address)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.adapters = AsyncAdapterClient(adapters_pb2_grpc.AdapterServiceStub(self._channel), timeout, self._metadata)
        self.store = AsyncStoreClient(store_pb2_grpc.StoreServiceStub(self._channel), timeout, self._metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends running calls and the connection."""
        await self._channel.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> types.Completion:
        """One whole completion of a prompt, or of `token_ids` or `messages`. Options: see `GenerateOptions`."""
        request = _requests.generate_request(prompt, options)
        return _responses.completion(await self._call(self._generation.Generate, request, self._deadline(options)))

    def stream(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[types.Chunk, None]:
        """The same piece by piece, for `async for`. Sent when iteration begins; closing it cancels the call. Who leaves
        the loop early closes it with `contextlib.aclosing`, because asyncio closes a dropped generator only later."""
        return self._stream(_requests.generate_request(prompt, options), self._deadline(options))

    async def tokenize(self, prompt: str | None = None, *, messages: Messages | None = None) -> types.Tokenized:
        """The token ids that the model would see for this prompt."""
        request = _requests.tokenize_request(prompt, messages)
        return _responses.tokenized(await self._call(self._generation.Tokenize, request, self._timeout))

    async def model(self) -> types.ModelInfo:
        """The resident base model."""
        request = generation_pb2.GetModelRequest()
        return _responses.model(await self._call(self._generation.GetModel, request, self._timeout))

    async def health(self, timeout: float = 5.0) -> bool:  # noqa: ASYNC109 (gRPC's own deadline)
        """Whether the server takes requests now; False too if nobody answers within `timeout` seconds."""
        return await self._ready(timeout, wait=False)

    async def wait_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109 (as above)
        """Returns when the server takes requests. Raises DeadlineExceeded after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if await self._ready(left, wait=True):
                return
            await asyncio.sleep(min(_channel.READY_POLL_S, left))
        raise DeadlineExceeded(f"the server was not ready within {timeout:g} s")

    async def _ready(self, limit_s: float, *, wait: bool) -> bool:
        try:
            response = await self._health.Check(
                _channel.READY_REQUEST, timeout=limit_s, metadata=self._metadata, wait_for_ready=wait
            )
        except grpc.RpcError as error:
            if error.code() in _channel.NOT_READY_CODES:
                return False
            raise from_rpc(error) from error
        return _channel.is_serving(response)

    def _deadline(self, options: GenerateOptions) -> float | None:
        return options.get("timeout", self._timeout)

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, limit_s: float | None
    ) -> _Response:
        with typed_errors():
            return await method(request, timeout=limit_s, metadata=self._metadata)

    async def _stream(
        self, request: generation_pb2.GenerateRequest, limit_s: float | None
    ) -> AsyncGenerator[types.Chunk, None]:
        call = self._generation.StreamGenerate(request, timeout=limit_s, metadata=self._metadata)
        try:
            with typed_errors():
                async for message in call:
                    yield _responses.chunk(message)
        finally:
            call.cancel()
