"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2_grpc

from overtone.client import _channel, _requests, _responses, types
from overtone.client._requests import GenerateOptions, Messages
from overtone.client._status import from_rpc, typed_errors
from overtone.client._stores import StoreClient
from overtone.client._sync_adapters import AdapterClient
from overtone.errors import DeadlineExceeded
from overtone.v1 import adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, store_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Talks to one server. Safe to share between threads; a context manager.

    address: "HOST:PORT". timeout: seconds that a call may take unless it says otherwise; None: no limit. credentials:
    for TLS (`grpc.ssl_channel_credentials`); None: plain text. metadata: sent with every call.
    """

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
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.adapters = AdapterClient(adapters_pb2_grpc.AdapterServiceStub(self._channel), timeout, self._metadata)
        self.store = StoreClient(store_pb2_grpc.StoreServiceStub(self._channel), timeout, self._metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends running calls and the connection."""
        self._channel.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> types.Completion:
        """One whole completion of a prompt, or of `token_ids` or `messages`. Options: see `GenerateOptions`."""
        request = _requests.generate_request(prompt, options)
        return _responses.completion(self._call(self._generation.Generate, request, self._deadline(options)))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Iterator[types.Chunk]:
        """The same piece by piece. Sent when iteration begins; closing or dropping the iterator cancels the call."""
        return self._stream(_requests.generate_request(prompt, options), self._deadline(options))

    def tokenize(self, prompt: str | None = None, *, messages: Messages | None = None) -> types.Tokenized:
        """The token ids that the model would see for this prompt."""
        request = _requests.tokenize_request(prompt, messages)
        return _responses.tokenized(self._call(self._generation.Tokenize, request, self._timeout))

    def model(self) -> types.ModelInfo:
        """The resident base model."""
        request = generation_pb2.GetModelRequest()
        return _responses.model(self._call(self._generation.GetModel, request, self._timeout))

    def health(self, timeout: float = 5.0) -> bool:
        """Whether the server takes requests now; False too if nobody answers within `timeout` seconds."""
        return self._ready(timeout, wait=False)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server takes requests. Raises DeadlineExceeded after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if self._ready(left, wait=True):
                return
            time.sleep(min(_channel.READY_POLL_S, left))
        raise DeadlineExceeded(f"the server was not ready within {timeout:g} s")

    def _ready(self, timeout: float, *, wait: bool) -> bool:
        try:
            response = self._health.Check(
                _channel.READY_REQUEST, timeout=timeout, metadata=self._metadata, wait_for_ready=wait
            )
        except grpc.RpcError as error:
            if error.code() in _channel.NOT_READY_CODES:
                return False
            raise from_rpc(error) from error
        return _channel.is_serving(response)

    def _deadline(self, options: GenerateOptions) -> float | None:
        return options.get("timeout", self._timeout)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout: float | None
    ) -> _Response:
        with typed_errors():
            return method(request, timeout=timeout, metadata=self._metadata)

    def _stream(self, request: generation_pb2.GenerateRequest, timeout: float | None) -> Iterator[types.Chunk]:
        call = self._generation.StreamGenerate(request, timeout=timeout, metadata=self._metadata)
        try:
            with typed_errors():
                for message in call:
                    yield _responses.chunk(message)
        finally:
            call.cancel()
