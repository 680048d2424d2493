"""What the services stand on: the loaded model, the running engine, the store, and the threads for blocking work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.lease import Lease, Share
from overtone.adapters.operations import Event
from overtone.adapters.records import parse_reference
from overtone.adapters.resident import SharedOnDevice, make_resident
from overtone.adapters.store import AdapterStore, StoreConfig
from overtone.api.changes import Changes
from overtone.api.config import MIB, ServerConfig
from overtone.api.convert import Draft, PromptSource
from overtone.api.leases import Ahead, Leases
from overtone.api.metrics import Metrics
from overtone.api.placement import cache_pages, host_of_adapters, make_runner
from overtone.api.sampling_params import seed_of
from overtone.api.sessions import Session, SessionTable
from overtone.api.statistics import AdapterStatistics
from overtone.api.tenants import tenant_weights
from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.grammars import GrammarCompiler, GuideSpec
from overtone.engine.guides import Guide
from overtone.engine.runner import ModelRunner
from overtone.engine.types import Request, SamplingParams, StoppingParams
from overtone.errors import BaseModelMismatch, Draining, EngineStarting, InvalidRequest, PromptTooLong, StoreCorrupted
from overtone.kernels import DCT, DFT, IDENTITY, Delta, Frame, LowRankCore, ResidentDelta, Term, sparse_core
from overtone.models.base import BaseModel

T = TypeVar("T")

GUIDE_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Running:
    """The generations of a call under way, as its handler sees them: one request for each completion, in their order, each
    with the engine's own, unique `request_id`."""

    requests: tuple[Request, ...]
    session: Session
    shares: tuple[Share, ...]


class Backend:
    """Built once the model is loaded. Methods are for the event loop; none of them blocks it."""

    def __init__(
        self,
        config: ServerConfig,
        base: BaseModel,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        on_death: Callable[[], None],
        threads: int = 0,
    ) -> None:
        alone = partial(torch.set_num_threads, 1) if threads else None
        self.base = base
        self.engine_config = engine_config(config, base)
        self.store = AdapterStore(store_config(config), describe(base), host_of_adapters(base))
        self.store.on_load = metrics.observe_load
        metrics.watch_store(self.store.stats)
        # Requests that need an adapter never wait behind uploads.
        self.changes = Changes(loop)
        self._leases = Leases(self.store, config.adapter_load_threads, alone)
        self._store_threads = ThreadPoolExecutor(4, "overtone-store", alone)
        # Nor do uploads wait behind imports, compaction or exports.
        self._import_threads = ThreadPoolExecutor(2, "overtone-imports", alone)
        self._upkeep_threads = ThreadPoolExecutor(5, "overtone-upkeep", alone)
        self._watch_threads = ThreadPoolExecutor(2, "overtone-watches", alone)
        # One thread: a tokenizer must not encode in two at once.
        self._tokenizer_thread = ThreadPoolExecutor(1, "overtone-tokenizer", alone)
        self._guide_threads = ThreadPoolExecutor(2, "overtone-guides", alone)
        self._grammars = GrammarCompiler(base.codec.serialized(), base.vocab_size, base.eos_token_ids)
        self.statistics = AdapterStatistics(config.tracked_adapters, config.metrics_top_adapters)
        metrics.watch_adapters(self.statistics, labelled=config.metrics_top_adapters > 0)
        self.store.subscribe(self._changed)
        self._sessions = SessionTable(loop, metrics, self.statistics, self._leases.releases)
        self._runner = runner = make_runner(self.engine_config, base, threads)
        metrics.watch_adapter_rows(lambda: dict(runner.paths))
        device = None if isinstance(runner, ModelRunner) else runner
        self.engine = Engine(
            runner.run,
            base.codec.decode,
            base.eos_token_ids,
            self.engine_config,
            self._sessions.report,
            on_death=on_death,
            on_idle=runner.forget,
            on_queued=lambda request: None if device is None else device.stage(request),
            ahead=device,
            nice=config.nice,
        )
        if device is not None:
            device.memory.bind(self.engine.pages.lend, self.engine.pages.take_back)
            self.engine.pages.lends(device.pool.give_back)
            metrics.watch_device_pool(lambda: device.pool.stats)
            self.store.on_freed(device.discard)
            device.warm_up()
        self.engine.start()

    async def in_store(self, work: Callable[[], T]) -> T:
        """Runs a call of the store in a thread, to its end even if the caller goes away."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._store_threads, work))

    async def in_import(self, work: Callable[[], T]) -> T:
        """The same for a batch of an import."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._import_threads, work))

    async def in_upkeep(self, work: Callable[[], T]) -> T:
        """The same for work on the store that may take long."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._upkeep_threads, work))

    async def in_watch(self, work: Callable[[], T]) -> T:
        """The same for what watches tell: hundreds of them must not delay an upload."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._watch_threads, work))

    def _changed(self, event: Event) -> None:
        """For the thread that changed the store."""
        self.changes.publish(event)
        if event.kind == "deleted":
            self.statistics.forget(event.adapter_id)

    async def in_tokenizer(self, work: Callable[[], T]) -> T:
        """Runs work on many tokens in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)

    async def tokenize(self, prompt: PromptSource) -> tuple[int, ...]:
        """Token ids of any kind of prompt. Raises `PromptTooLong` before tokenising what cannot fit."""
        codec = self.base.codec
        if isinstance(prompt, tuple):
            return prompt
        characters = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        if characters > self.engine_config.max_context_tokens * codec.longest_token_chars:
            raise PromptTooLong(
                f"the prompt has {characters} characters, more than {self.engine_config.max_context_tokens} tokens can hold",
                field="prompt",
            )
        if isinstance(prompt, str):
            return tuple(await self.in_tokenizer(lambda: codec.encode(prompt)))
        return tuple(await self.in_tokenizer(lambda: codec.encode_chat(prompt)))

    async def start(self, draft: Draft, engine_id: str, time_remaining: float | None) -> Running:
        """Tokenises, while the adapter comes into memory, and queues the request with a lease on it."""
        arrival = time.monotonic()
        with self._leases.ahead(draft.adapters, draft.turn.tenant) as coming:
            ids = await self.tokenize(draft.prompt)
            stopping = self._check_prompt(ids, draft)
            guide = await self._compile(draft.guide) if draft.guide else None
            lease = await self._arrived(coming, draft)
            request = Request(
                request_id=engine_id,
                prompt_ids=ids,
                sampling=draft.sampling,
                stopping=stopping,
                arrival_time=arrival,
                deadline=None if time_remaining is None else arrival + time_remaining,
                adapter=lease.adapter.deltas if lease else None,
                adapter_key=lease.adapter.digest if lease else "",
                logprobs=draft.logprobs,
                top_n=draft.top_n,
                prompt_logprobs=draft.prompt_logprobs,
                guide=guide,
                tenant=draft.turn.tenant,
                priority=draft.turn.priority,
                cache_salt=draft.turn.cache_salt,
            )
            requests = (request, *(_another(request, index) for index in range(1, draft.n)))
            session = self._sessions.submit(self.engine, requests, lease)
            return Running(requests, session, lease.shares if lease else ())

    async def _arrived(self, coming: Ahead, draft: Draft) -> Lease | None:
        try:
            return await coming.lease()
        except (StoreCorrupted, BaseModelMismatch):
            # Only of an adapter that exists; of several it is not known which.
            if len(draft.adapters) == 1 and (reference := draft.adapters[0].reference):
                self.statistics.failed(parse_reference(reference)[0])
            raise

    async def _compile(self, spec: GuideSpec) -> Guide:
        """On threads of its own: a guide that takes long delays other guides only."""
        compiling = asyncio.get_running_loop().run_in_executor(self._guide_threads, self._grammars.compile, spec)
        try:
            return await asyncio.wait_for(compiling, GUIDE_LIMIT_S)
        except TimeoutError:
            field = f"sampling.guided.{spec.kind}"
            raise InvalidRequest(f"{field} was not compiled within {GUIDE_LIMIT_S:g} s", field=field) from None

    def _check_prompt(self, ids: tuple[int, ...], draft: Draft) -> StoppingParams:
        """What the request may generate. Raises if the model cannot take its prompt."""
        limit, stopping = self.engine_config.max_context_tokens, draft.stopping
        if draft.length_defaulted and len(ids) < limit:
            stopping = replace(stopping, max_new_tokens=min(stopping.max_new_tokens, limit - len(ids)))
        if not ids:
            raise InvalidRequest("the prompt is empty: it has no tokens", field="prompt")
        self._check_token_ids("token_ids.ids", ids)
        self._check_token_ids("sampling.logit_bias", [token for token, _ in draft.sampling.logit_bias])
        self._check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids)
        if len(ids) + stopping.max_new_tokens > limit:
            raise PromptTooLong(
                f"the prompt's {len(ids)} tokens and max_new_tokens {stopping.max_new_tokens} exceed the context of {limit}",
                field="prompt" if len(ids) >= limit else "stopping.max_new_tokens",
                metadata={"prompt_tokens": str(len(ids)), "max_context_tokens": str(limit)},
            )
        return stopping

    def _check_token_ids(self, field: str, ids: Sequence[int]) -> None:
        bad = next((token for token in ids if token >= self.base.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(
                f"token id {bad} of {field} is not below the vocabulary's size {self.base.vocab_size}", field=field
            )

    async def warm_up(self) -> None:
        """Short greedy generations without and with an adapter: finds out now, not in a user's request, what cannot run."""
        for adapter in (None, *(touching_every_module(self.base, term) for term in self._terms())):
            request = Request(
                request_id="warm-up",
                prompt_ids=(0, 0),
                sampling=SamplingParams(),
                stopping=StoppingParams(2, ignore_eos=True),
                arrival_time=time.monotonic(),
                adapter=adapter,
            )
            session = self._sessions.submit(self.engine, [request], None)
            finished = False
            while not finished:
                finished = any(event.last for event in await session.take())

    def _terms(self) -> list[Callable[[tuple[int, int]], Term]]:
        """What makes the operators run for the first time, which on a GPU compiles them."""
        if self.base.capability is None:
            return [zero_coefficient]
        return [zero_coefficient, partial(zero_coefficient, frame=DFT), zero_pair]

    def close(self) -> None:
        """Ends what still runs. Blocks."""
        self.engine.stop()
        self._runner.close()
        self._tokenizer_thread.shutdown()
        self._leases.close()
        self._guide_threads.shutdown(wait=False, cancel_futures=True)  # whoever waits for a guide is gone
        for threads in (self._import_threads, self._upkeep_threads, self._watch_threads, self._store_threads):
            threads.shutdown()
        self.store.close()


def _another(request: Request, index: int) -> Request:
    """Completion `index` of the same prompt."""
    sampling = replace(request.sampling, seed=seed_of(request.sampling.seed, index))
    return replace(request, request_id=f"{request.request_id}-{index}", sampling=sampling, prompt_logprobs=False)


def describe(base: BaseModel) -> BaseDescription:
    return BaseDescription(base.name, base.fingerprint, base.modules, base.embeddings, base.weight, base.conv1d)


def zero_coefficient(shape: tuple[int, int], frame: Frame = DCT) -> Term:
    """A sparse core of one coefficient, 0."""
    index, (p, q) = torch.zeros(1, dtype=torch.int64), (frame.coefficients(size) or 0 for size in shape)
    return Term(frame, sparse_core(index, index, torch.zeros(1), (p, q)), frame)


def zero_pair(shape: tuple[int, int]) -> Term:
    return Term(IDENTITY, LowRankCore(torch.zeros(8, shape[1]), torch.zeros(shape[0], 8)), IDENTITY)


def touching_every_module(
    base: BaseModel, term: Callable[[tuple[int, int]], Term] = zero_coefficient
) -> Mapping[str, ResidentDelta]:
    """An adapter of one term in each linear layer. Of zeros it changes nothing and takes every path."""
    deltas = {name: Delta((term(shape),), shape) for name, shape in base.modules.items()}
    return make_resident("", "warm-up", deltas, SharedOnDevice(host_of_adapters(base))).deltas


class BackendSlot:
    """Where the services find the backend once it is there."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._draining = False

    def set(self, backend: Backend) -> None:
        self._backend = backend

    def get(self) -> Backend:
        if self._backend is None:
            raise EngineStarting("the server is still loading its model", retry_after_s=1.0)
        return self._backend

    def drain(self) -> None:
        self._draining = True

    def changing(self) -> Backend:
        """`get` for what changes the store or takes long. Raises `Draining` once the server is about to end."""
        if self._draining:
            raise Draining("the server is shutting down", retry_after_s=1.0)
        return self.get()


def engine_config(config: ServerConfig, base: BaseModel) -> EngineConfig:
    """The engine's limits for this model: pages from bytes, the context from what the model and the cache allow."""
    pages = cache_pages(config, base)
    fits = min(base.max_context_tokens, pages * config.page_tokens)
    return EngineConfig(
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        max_context_tokens=min(config.max_context_tokens, base.max_context_tokens) or fits,
        page_tokens=config.page_tokens,
        cache_pages=pages,
        max_queue=config.max_queue,
        max_queue_tokens=config.max_queue_tokens,
        max_queue_share=config.max_queue_share,
        prefix_cache=config.prefix_cache,
        deterministic=base.deterministic,
        tenant_weights=tenant_weights(config.tenant_weight),
    )


def store_config(config: ServerConfig) -> StoreConfig:
    return StoreConfig(
        root=config.store,
        memory_bytes=config.adapter_memory_bytes,
        max_upload_bytes=config.max_adapter_bytes,
        strict_base=config.strict_base,
        adapter_roots=config.adapter_root,
        disk_bytes=config.disk_mib * MIB,
        remote_url=config.remote_store or "",
        keep_versions=config.keep_versions,
    )
