"""GenerationService: a request becomes a session with the engine; its events become responses."""

from __future__ import annotations

import contextlib
import importlib.metadata
import uuid
from collections.abc import AsyncIterator, Mapping

from overtone.api import convert
from overtone.api.access_log import AccessLog
from overtone.api.backend import Backend, BackendSlot, Running
from overtone.api.config import ServerConfig
from overtone.api.convert import Draft
from overtone.api.responses import Parts, WholeResponse
from overtone.api.status import Context, out_of_time
from overtone.errors import DeadlineExceeded
from overtone.v1 import generation_pb2 as pb
from overtone.v1 import generation_pb2_grpc as pb_grpc


class GenerationService(pb_grpc.GenerationServiceServicer):
    """The data plane. Errors leave as exceptions of `overtone.errors`; the interceptor makes them a status."""

    def __init__(self, config: ServerConfig, backend: BackendSlot, log: AccessLog) -> None:
        self._config = config
        self._backend = backend
        self._log = log

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        whole = WholeResponse()
        async for part in self._stream(request, context, "Generate"):
            whole.add(part)
        return whole.response()

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async for part in self._stream(request, context, "StreamGenerate"):
            yield part

    async def _stream(
        self, request: pb.GenerateRequest, context: Context, method: str
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        backend = self._backend.get()
        with self._log.request(method, request) as entry:
            limit = backend.engine_config.max_context_tokens
            draft = convert.draft(
                request, self._config.default_max_new_tokens, limit, self._config.max_inline_adapter_bytes
            )
            entry.fields["request_id"] = draft.request_id
            running = await backend.start(draft, uuid.uuid4().hex, context.time_remaining())
            entry.started(running)
            try:
                parts = Parts(draft, running, backend.base.codec, await self._prompt_echo(draft, running, backend))
                while parts.open:
                    events = await running.session.take()
                    entry.events(events)
                    for part in parts.of(events):
                        yield part
            finally:
                # Harmless once it has ended; if the client went away it leaves the batch before the next step.
                error = DeadlineExceeded("the request's deadline passed") if out_of_time(context) else None
                for one in running.requests:
                    backend.engine.cancel(one.request_id, error)

    @staticmethod
    async def _prompt_echo(draft: Draft, running: Running, backend: Backend) -> pb.Prompt | None:
        if not draft.echo_prompt:
            return None
        ids = running.requests[0].prompt_ids
        if isinstance(draft.prompt, str):
            text = draft.prompt
        else:
            text = await backend.in_tokenizer(lambda: backend.base.codec.decode(ids, skip_special_tokens=False))
        return pb.Prompt(text=text, token_ids=ids)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        backend = self._backend.get()
        ids = await backend.tokenize(convert.prompt(request, backend.engine_config.max_context_tokens))
        texts = await backend.in_tokenizer(lambda: [backend.base.codec.token_text(token) for token in ids])
        return pb.TokenizeResponse(token_ids=ids, tokens=texts)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        backend = self._backend.get()
        base = backend.base
        return pb.Model(
            name=base.name,
            architecture=base.architecture,
            fingerprint=base.fingerprint,
            dtype=base.dtype_name,
            device=str(base.device),
            vocab_size=base.vocab_size,
            max_context_tokens=backend.engine_config.max_context_tokens,
            eos_token_ids=sorted(base.eos_token_ids),
            has_chat_template=base.codec.has_chat_template,
            modules=_modules(base.modules),
            embeddings=_modules(base.embeddings),
            server_version=server_version(),
        )


def _modules(shapes: Mapping[str, tuple[int, int]]) -> list[pb.Module]:
    return [pb.Module(name=name, out_features=p, in_features=q) for name, (p, q) in shapes.items()]


def server_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("overtone")
    return "unknown"
