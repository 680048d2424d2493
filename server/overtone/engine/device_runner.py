"""One step through the model on a GPU: decoding steps as recorded passes, others as they come.

A recorded pass serves all batches of one bucket of rows, one bucket of lengths and one set of `Use`s: whose adapters its
rows have is data. A batch without adapters runs a pass that has nothing of adapters in it. Slow twin:
`overtone.engine.runner.ModelRunner`.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from overtone.engine.batch import pack_tokens
from overtone.engine.config import EngineConfig
from overtone.engine.decode_inputs import DecodeInputs, bucket_of
from overtone.engine.flight import Choice
from overtone.engine.logprobs import prompt_rows
from overtone.engine.recorded import Recorder
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sole_adapter import SoleAdapter
from overtone.engine.types import Request
from overtone.kernels.gpu.attend_decode import SeenKeys
from overtone.kernels.gpu.layer_configs import greedy_config
from overtone.kernels.gpu.sample import GreedyRoom, choose_greedy
from overtone.models.adapter_rows import PATHS, AdapterRows
from overtone.models.adapter_step import AdapterStep
from overtone.models.base import BaseModel
from overtone.models.channels import AdapterDeltas
from overtone.models.device.extents import KINDS, Packer, Plans, Use
from overtone.models.device.memory import DeviceMemory
from overtone.models.device.moved import MovedAdapters
from overtone.models.device.operators import Operators
from overtone.models.device.paged import Chunks, DevicePaged, chunks_of
from overtone.models.device.pool import DevicePool, OnDevice
from overtone.models.device.rows import KindRows, Run, kind_rows, uses_of
from overtone.models.device.step import DeviceStep, Steps
from overtone.models.lanes import Segment
from overtone.models.paged import Span

log = logging.getLogger(__name__)

_SHORT_PAGES = 16
"""The fewest pages that a recorded pass has room for: shorter sequences share it."""
_LITTLE_MORE = 2
_RECORDED = 256
"""Passes that are kept, the least recently used goes: each has the launches of a step and its inputs."""


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a recorded pass depends on: its rows, the pages that a row may have, what its adapters change."""

    rows: int
    pages: int
    uses: frozenset[Use]


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    inputs: DecodeInputs
    compute: Callable[[], torch.Tensor]


class DeviceRunner:
    """Runs step plans on a base model whose attention and layers are the device's. Used by one thread."""

    def __init__(self, base: BaseModel, config: EngineConfig, memory: DeviceMemory) -> None:
        assert base.capability is not None
        self._base, self._config, self.memory = base, config, memory
        plans = Plans(base.dtype, base.device)
        packer = Packer(base.modules, plans)
        self._operators = Operators(packer.slots, plans, memory.words, base.capability)
        self.pool = DevicePool(packer, memory, self._operators.accept)
        self._sole = SoleAdapter(base)
        self._recorder = Recorder(base.device, bucket_of(config.max_batch))
        self._followed = False
        self._passes: OrderedDict[PassShape, _Pass] = OrderedDict()
        self.paths = Counter(dict.fromkeys(PATHS, 0))
        self.forget()

    @property
    def merged(self) -> bool:
        """Whether the weights have an adapter merged."""
        return self._sole.merged

    def forget(self) -> None:
        """Lets go of the adapters of the last batch that are not in the pool: their leases have ended."""
        self._rows, self._head_rows = (AdapterRows(self._base.device, self.paths) for _ in range(2))
        self._moved = MovedAdapters(self._base.device)

    def stage(self, request: Request) -> None:
        """Begins to bring a waiting request's adapter to the device."""
        if request.adapter is not None:
            self.pool.stage(_key(request), request.adapter)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Records the base model's passes of short sequences, so that no request waits for that."""
        if not self._recorder.records:
            return
        rows = 0
        while rows < self._config.max_batch:
            shape = PassShape(bucket_of(rows + 1), _SHORT_PAGES, frozenset())
            inputs = self.inputs_of(shape)
            inputs.fill([], [])
            self._keep(shape, _Pass(inputs, self._recorder.record(partial(self.compute, inputs, shape.uses))))
            rows = shape.rows

    def close(self) -> None:
        self.pool.close()

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (S + P, vocabulary), as `ModelRunner.run` has them, on the device; valid until the next run. tokens: of a
        plan of decodes alone, see `DecodeInputs.fill`."""
        try:
            return self._run(plan, tokens)
        except torch.OutOfMemoryError:
            log.warning("out of device memory: what is kept for speed goes, and the step is tried once more")
            self._sole.give_up()
            self._passes.clear()
            self.forget()
            torch.cuda.empty_cache()
            return self._run(plan, tokens)

    def _run(self, plan: StepPlan, tokens: torch.Tensor | None) -> torch.Tensor:
        wanted = {_key(one.sequence.request): deltas for one in plan.chunks if (deltas := one.sequence.request.adapter)}
        if self._sole.serves(plan):
            changed = len(next(iter(wanted.values())))
            self.paths["merged"] += changed * sum(chunk.length for chunk in plan.chunks)
            wanted = {}
        found = self.pool.of(wanted)
        placed = [found.get(_key(chunk.sequence.request)) for chunk in plan.chunks]
        others = {key: deltas for key, deltas in wanted.items() if found[key] is None}
        self._followed = not plan.prefills and not others
        try:
            if self._followed:
                return self._decode(plan.decodes, placed, tokens)
            assert tokens is None, "a step ahead is for a batch that can be recorded"
            return self._mixed(plan, placed, others)
        except BaseException:
            self.forget()
            raise
        finally:
            self._base.slot.step = self._base.slot.head = None
            self.pool.prefetch()

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> Choice | None:
        """See `AheadRunner`."""
        if not self._followed:
            return None
        rows, vocabulary = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
        finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
        assert self._base.capability is not None
        config = greedy_config(self._base.capability)
        choose_greedy(logits, tokens, finite, GreedyRoom.of(rows, vocabulary, config, logits.device), config)
        both = torch.stack((tokens, finite.to(torch.int64)))
        if not both.is_cuda:
            return Choice(tokens, lambda: _read(both))
        host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
        host.copy_(both, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def read() -> tuple[list[int], list[bool]]:
            done.synchronize()  # of what was asked for until then, not of the step that follows
            return _read(host)

        return Choice(tokens, read)

    # -- decoding alone

    def _decode(
        self, chunks: Sequence[Chunk], adapters: Sequence[OnDevice | None], tokens: torch.Tensor | None
    ) -> torch.Tensor:
        self._count("device", [Run(1, one) for one in adapters])
        pages = max(chunk.sequence.computed + (tokens is not None) for chunk in chunks) // self._config.page_tokens + 1
        shape = PassShape(bucket_of(len(chunks)), max(_SHORT_PAGES, 1 << (pages - 1).bit_length()), uses_of(adapters))
        shape = self._known_shape(shape)
        known = self._passes.get(shape)
        if known is None:
            inputs = self.inputs_of(shape)
            inputs.fill(chunks, adapters, tokens)
            known = _Pass(inputs, self._recorder.record(partial(self.compute, inputs, shape.uses)))
            self._keep(shape, known)
        else:
            known.inputs.fill(chunks, adapters, tokens)
        self._passes.move_to_end(shape)
        return known.compute()[: len(chunks)]

    def _known_shape(self, shape: PassShape) -> PassShape:
        """`shape`, or one that there is a pass for and that does little more: records that a row does not have end at
        once. Else every mix of kinds of adapters would have a pass of its own."""
        if shape in self._passes or not shape.uses:
            return shape
        larger = [
            one
            for one in self._passes
            if (one.rows, one.pages) == (shape.rows, shape.pages)
            and shape.uses <= one.uses
            and len(one.uses) <= _LITTLE_MORE * len(shape.uses)
        ]
        return min(larger, key=lambda one: len(one.uses), default=shape)

    def _keep(self, shape: PassShape, made: _Pass) -> None:
        self._passes[shape] = made
        while len(self._passes) > _RECORDED:
            self._passes.popitem(last=False)

    def inputs_of(self, shape: PassShape) -> DecodeInputs:
        return DecodeInputs(shape.rows, shape.pages, self._config.page_tokens, self._base.device)

    def compute(self, inputs: DecodeInputs, uses: frozenset[Use]) -> torch.Tensor:
        """Logits (rows, vocabulary) of one pass: the same launches each time, whatever `inputs` hold."""
        rows = {kind: KindRows.decoding(inputs.order, inputs.directories[kind]) for kind in KINDS}
        slot = self._base.slot
        # All rows reach the head, in their order.
        slot.step = slot.head = DeviceStep(self._operators, uses, rows) if uses else None
        longest = inputs.pages * self._config.page_tokens
        paged = self._paged(inputs.slots, decoded=inputs.seen, longest=longest)
        return self._forward(inputs.ids[None], inputs.positions[None], inputs.order, paged)

    # -- steps with prompts, or with adapters that only torch's operators apply

    def _mixed(
        self, plan: StepPlan, adapters: Sequence[OnDevice | None], others: Mapping[Hashable, AdapterDeltas]
    ) -> torch.Tensor:
        packed = pack_tokens(plan, self._base.device)
        spans, slots = self._spans(plan)
        slot = self._base.slot
        slot.step, slot.head = self._steps(plan, adapters, others)
        decoding = DecodeInputs(
            len(plan.decodes),
            max((-(-spans[row].end // self._config.page_tokens) for row in range(len(plan.decodes))), default=0),
            self._config.page_tokens,
            self._base.device,
        )
        if plan.decodes:
            decoding.fill(plan.decodes, adapters[: len(plan.decodes)])
        paged = self._paged(
            torch.tensor(slots, dtype=torch.int64, device=self._base.device),
            decoded=decoding.seen if plan.decodes else None,
            longest=decoding.pages * self._config.page_tokens,
            chunks=chunks_of(spans[len(plan.decodes) :], self._base.device),
        )
        return self._forward(packed.input_ids, packed.position_ids, packed.logit_rows, paged)

    def _spans(self, plan: StepPlan) -> tuple[list[Span], list[int]]:
        """Of all chunks, and where their tokens are written."""
        spans: list[Span] = []
        slots: list[int] = []
        size, start = self._config.page_tokens, 0
        for chunk in plan.chunks:
            past, pages = chunk.sequence.computed, chunk.sequence.pages
            end = past + chunk.length
            spans.append(Span(start, chunk.length, past, pages[: -(-end // size)]))
            slots += (pages[place // size] * size + place % size for place in range(past, end))
            start += chunk.length
        return spans, slots

    def _steps(
        self, plan: StepPlan, adapters: Sequence[OnDevice | None], others: Mapping[Hashable, AdapterDeltas]
    ) -> tuple[Steps | None, Steps | None]:
        """For the layers, which see all tokens, and for the head, which sees those whose logits somebody needs."""
        count = len(plan.decodes)
        pairs = list(zip(plan.chunks, adapters, strict=True))
        ends = [(Run(1, one), chunk) for chunk, one in pairs if chunk.completes]
        asked = [(Run(len(rows), one), chunk) for chunk, one in pairs[count:] if (rows := prompt_rows(chunk))]
        moved = self._moved.of(others)
        body = [(Run(chunk.length, one), chunk) for chunk, one in pairs]
        self._count("device", [run for run, _ in body])
        return (
            self._step(count, body, moved, self._rows),
            self._step(count, [*ends, *asked], moved, self._head_rows),
        )

    def _step(
        self,
        decodes: int,
        runs: Sequence[tuple[Run, Chunk]],
        moved: Mapping[Hashable, AdapterDeltas],
        kept: AdapterRows,
    ) -> Steps | None:
        adapters = [run.adapter for run, _ in runs]
        uses = uses_of(adapters)
        found: list[DeviceStep | AdapterStep] = []
        if uses:
            rows = {
                kind: kind_rows(adapters[:decodes], [run for run, _ in runs[decodes:]], kind, self._base.device)
                for kind in {use.kind for use in uses}
            }
            found.append(DeviceStep(self._operators, uses, rows))
        if moved:
            segments = [Segment(run.tokens, moved.get(_key(chunk.sequence.request))) for run, chunk in runs]
            found.append(AdapterStep(segments[:decodes], segments[decodes:], self._base.frames, kept))
        return Steps(found) if found else None

    # -- both

    def _paged(
        self, slots: torch.Tensor, decoded: SeenKeys | None, longest: int, chunks: Chunks | None = None
    ) -> DevicePaged:
        assert self._base.capability is not None
        cache, windows = self.memory.cache, self._base.windows
        return DevicePaged(cache, slots, windows, self._base.capability, decoded, longest, chunks, self._base.varlen)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, paged: DevicePaged
    ) -> torch.Tensor:
        output = self._base.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=paged
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _count(self, path: str, runs: Sequence[Run]) -> None:
        self.paths[path] += sum(run.tokens * len(run.adapter.uses) for run in runs if run.adapter is not None)


def _read(both: torch.Tensor) -> tuple[list[int], list[bool]]:
    tokens, finite = both.tolist()
    return tokens, [bool(one) for one in finite]


def _key(request: Request) -> Hashable:
    """What names a request's adapter: its digest, or, of one without, the mapping itself."""
    return request.adapter_key or _Identity(request.adapter)


@dataclass(frozen=True, slots=True, eq=False)
class _Identity:
    """Equal to another of the very same adapter, which it holds."""

    adapter: AdapterDeltas | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.adapter is other.adapter

    def __hash__(self) -> int:
        return id(self.adapter)
