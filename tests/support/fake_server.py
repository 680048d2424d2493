"""A server of canned answers on a real loopback socket, and one way to drive both clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_status import rpc_status

from overtone.api.status import to_status
from overtone.errors import OvertoneError
from overtone.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

# Tells gRPC's retry policy to leave it.
NO_RETRY = ("grpc-retry-pushback-ms", "-1")
PAGES = (("a", "b"), ("c", "d"), ("e",))


def outcome() -> generation_pb2.Outcome:
    made = generation_pb2.Outcome(
        finish_reason=generation_pb2.FINISH_REASON_STOP,
        stop="!",
        usage=generation_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_prompt_tokens=1),
        adapter="mine",
        adapter_digest="d" * 64,
        adapters=[generation_pb2.AdapterUse(adapter="mine", digest="d" * 64, weight=1.0)],
        request_id="r-1",
        seed=7,
    )
    made.timings.queue.FromMilliseconds(250)
    made.timings.first_token.FromMilliseconds(500)
    made.timings.total.FromMilliseconds(1500)
    return made


def tokens() -> list[generation_pb2.TokenInfo]:
    top = [generation_pb2.TopToken(id=9, text="H", logprob=-0.25)]
    return [generation_pb2.TokenInfo(id=5, text="Hi", logprob=-0.5, rank=2, top=top)]


class FakeServer(generation_pb2_grpc.GenerationServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """Records requests. `fail`: errors for the next calls, None for a success. `hang`: streams never end."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.fail: list[OvertoneError | grpc.StatusCode | None] = []
        self.retryable = False
        self.hang = False
        self.ended = threading.Event()
        self.health = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(8))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hang = False
        self._server.stop(None).wait()

    def Generate(self, request: Any, context: Any) -> generation_pb2.GenerateResponse:
        self._enter(request, context)
        if self.hang:
            self._wait(context)
        prompt = generation_pb2.Prompt(text="Say", token_ids=[1, 2, 3])
        return generation_pb2.GenerateResponse(
            text="Hi", token_ids=[5, 6], tokens=tokens(), prompt=prompt, outcome=outcome()
        )

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[generation_pb2.StreamGenerateResponse]:
        self._enter(request, context)
        prompt = generation_pb2.Prompt(text="Say", token_ids=[1, 2, 3])
        try:
            # A server that finds the call cancelled here asks for no second message.
            yield generation_pb2.StreamGenerateResponse(text="H", token_ids=[5], tokens=tokens(), prompt=prompt)
            # Goes on sending: that is how a server finds out soon that nobody listens any more.
            while self.hang and context.is_active():
                time.sleep(0.02)
                yield generation_pb2.StreamGenerateResponse()
        finally:
            self.ended.set()
        yield generation_pb2.StreamGenerateResponse(text="i", token_ids=[6], outcome=outcome())

    def Tokenize(self, request: Any, context: Any) -> generation_pb2.TokenizeResponse:
        self._enter(request, context)
        return generation_pb2.TokenizeResponse(token_ids=[1, 2], tokens=["He", "llo"])

    def GetModel(self, request: Any, context: Any) -> generation_pb2.Model:
        self._enter(request, context)
        module = generation_pb2.Module(name="q_proj", out_features=4, in_features=8)
        return generation_pb2.Model(name="demo", vocab_size=99, eos_token_ids=[2], modules=[module])

    def UploadAdapter(self, request_iterator: Any, context: Any) -> adapters_pb2.Adapter:
        self._enter(messages := list(request_iterator), context)
        return self._adapter(messages[0].header.adapter_id)

    def LoadAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._enter(request, context)
        return self._adapter(request.adapter_id)

    def GetAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._enter(request, context)
        return self._adapter(request.name.removeprefix("adapters/"))

    def ListAdapters(self, request: Any, context: Any) -> adapters_pb2.ListAdaptersResponse:
        self._enter(request, context)
        page = int(request.page_token or 0)
        following = str(page + 1) if page + 1 < len(PAGES) else ""
        found = [self._adapter(name) for name in PAGES[page]]
        return adapters_pb2.ListAdaptersResponse(adapters=found, next_page_token=following)

    def UpdateAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._enter(request, context)
        made = self._adapter(request.adapter.name.removeprefix("adapters/"))
        made.pinned = request.adapter.pinned
        return made

    def DeleteAdapter(self, request: Any, context: Any) -> adapters_pb2.DeleteAdapterResponse:
        self._enter(request, context)
        return adapters_pb2.DeleteAdapterResponse(freed_bytes=2048, pending_bytes=4096, lease_count=2)

    def _enter(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        failure = self.fail.pop(0) if self.fail else None
        trailing = () if self.retryable else (NO_RETRY,)
        if isinstance(failure, OvertoneError):
            status = rpc_status.to_status(to_status(failure))
            context.set_trailing_metadata((*trailing, *status.trailing_metadata))
            context.abort(status.code, status.details)
        if isinstance(failure, grpc.StatusCode):
            context.set_trailing_metadata(trailing)
            context.abort(failure, "bare")

    def _wait(self, context: Any) -> None:
        """Until this call has ended, which `ended` then tells."""
        mine = threading.Event()
        if not context.add_callback(mine.set):  # it has ended already
            mine.set()
        mine.wait(300)
        self.ended.set()

    @staticmethod
    def _adapter(adapter_id: str) -> adapters_pb2.Adapter:
        made = adapters_pb2.Adapter(
            name=f"adapters/{adapter_id}",
            uid="u-1",
            digest="a" * 64,
            family="loca",
            state=adapters_pb2.Adapter.STATE_RESIDENT,
            labels={"team": "[red]x"},
            size_bytes=2048,
            warnings=["odd"],
            etag="e-1",
            versions=["a" * 64],
            tenant="anna",
            base_fingerprint="f" * 64,
        )
        made.create_time.FromSeconds(86400)
        made.last_used_time.FromSeconds(172800)
        return made


class Driver:
    """Calls either client alike: awaits what must be awaited and collects what is iterated."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._runner = asyncio.Runner()
        self.client: Any = self.run(make())

    def __call__(self, use: Callable[[Any], Any]) -> Any:
        return self.run(use(self.client))

    def run(self, result: Any) -> Any:
        if hasattr(result, "__aiter__"):
            return self._runner.run(_collect(result))
        if hasattr(result, "__next__"):
            return list(result)
        return self._runner.run(_wait_for(result)) if hasattr(result, "__await__") else result

    def close(self) -> None:
        self.run(self.client.close())
        self._runner.close()


async def _collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def _wait_for(result: Any) -> Any:
    return await result
