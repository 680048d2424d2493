"""Around every call of our services: errors become a Status, every call is counted by method and code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from overtone.api.metrics import Metrics
from overtone.api.status import Context, abort, out_of_time
from overtone.errors import DeadlineExceeded, EngineError, OvertoneError

log = logging.getLogger(__name__)

STALL_S = 120.0
"""What a client may take to read a response."""
_FAREWELL_S = 1.0

_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""(request streams, response streams) -> the handler's attribute, and how to make a handler of that kind."""


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps all four kinds of handlers. An exception that is none of ours is logged and sent as INTERNAL without details."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Until no call of our services is under way, or the time is over. Health watches do not count."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith("/overtone."):
            return handler
        name = method.rpartition("/")[2]
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
        behaviour = wrap(name, getattr(handler, attribute))
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _wrap_unary(self, name: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            with self._counted():
                try:
                    response = await behaviour(request, context)
                except BaseException as error:
                    await self._fail(name, context, error)
                self._metrics.count_call(name, "OK")
                return response

        return call

    def _wrap_stream(
        self, name: str, behaviour: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Context) -> None:
            with self._counted():
                try:
                    async with contextlib.aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            await _write(context, response)
                except BaseException as error:
                    await self._fail(name, context, error)
                self._metrics.count_call(name, "OK")

        return call

    async def _fail(self, name: str, context: Context, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._metrics.count_call(name, "DEADLINE_EXCEEDED" if out_of_time(context) else "CANCELLED")
            raise error
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, OvertoneError):
            log.error("%s failed", name, exc_info=error)
            error = EngineError("internal error; the server's log has the details")
        self._metrics.count_call(name, error.grpc_code)
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await abort(context, error)
        except TimeoutError:
            # The status waits behind responses that the client does not read; it goes out if it ever does.
            raise asyncio.CancelledError from error


async def _write(context: Context, response: Any) -> None:
    """Flow control holds a client's responses back while it does not read them: not for ever, or it kept its place so."""
    try:
        async with asyncio.timeout(STALL_S):
            await context.write(response)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the client has read nothing for {STALL_S:g} s") from error
