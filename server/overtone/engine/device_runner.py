"""One step through the model on a GPU: decoding steps as recorded passes, others as they come.

Slow twin: `overtone.engine.runner.ModelRunner`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from overtone.engine.batch import pack_tokens, spans_of
from overtone.engine.config import EngineConfig
from overtone.engine.decode_inputs import DecodeInputs
from overtone.engine.decode_passes import DecodePasses
from overtone.engine.device_choice import choose
from overtone.engine.flight import Choice
from overtone.engine.logprobs import prompt_rows
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sole_adapter import SoleAdapter
from overtone.engine.types import Request
from overtone.models.adapter_rows import PATHS, AdapterRows
from overtone.models.adapter_step import AdapterStep
from overtone.models.base import BaseModel
from overtone.models.channels import AdapterDeltas
from overtone.models.device.extents import Packer, Plans
from overtone.models.device.forward import DeviceForward
from overtone.models.device.memory import DeviceMemory
from overtone.models.device.moved import MovedAdapters
from overtone.models.device.operators import Operators
from overtone.models.device.paged import chunks_of
from overtone.models.device.pool import DevicePool, OnDevice
from overtone.models.device.rows import Run, kind_rows, uses_of
from overtone.models.device.step import DeviceStep, Steps
from overtone.models.lanes import Segment

log = logging.getLogger(__name__)


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
        self._forward = DeviceForward(base, memory)
        self.passes = DecodePasses(self._forward, self._operators, base.slot, config, base.device)
        self._followed = False
        self._discarded: deque[Hashable] = deque()
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
        self.pool.forget_later()

    def discard(self, digest: str) -> None:
        """For any thread: an adapter that is nowhere any more need not keep its room in the pool after the next step."""
        if self.pool.has(digest):
            self._discarded.append(digest)

    def stage(self, request: Request) -> None:
        """Begins to bring a waiting request's adapter to the device."""
        if request.adapter is not None:
            self.pool.stage(_key(request), request.adapter)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Records what the first requests would wait for."""
        self.passes.warm_up()

    def close(self) -> None:
        self.pool.close()

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> Choice | None:
        """See `AheadRunner`."""
        return choose(logits, self._forward.capability) if self._followed else None

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (S + P, vocabulary), as `ModelRunner.run` has them, on the device; valid until the next run. tokens: of a
        plan of decodes alone, see `DecodeInputs.fill`."""
        try:
            return self._run(plan, tokens)
        except torch.OutOfMemoryError:
            log.warning("out of device memory: what is kept for speed goes, and the step is tried once more")
            self._sole.give_up()
            self.passes.clear()
            self.forget()
            torch.cuda.empty_cache()
            return self._run(plan, tokens)

    def _run(self, plan: StepPlan, tokens: torch.Tensor | None) -> torch.Tensor:
        while self._discarded:
            self.pool.forget(self._discarded.popleft())
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
                self._count("device", [Run(1, one) for one in placed])
                return self.passes.run(plan.decodes, placed, tokens)
            assert tokens is None, "a step ahead is for a batch that can be recorded"
            return self._mixed(plan, placed, others)
        except BaseException:
            self.forget()
            raise
        finally:
            self._base.slot.step = self._base.slot.head = None
            self.pool.prefetch()

    # -- steps with prompts, or with adapters that only torch's operators apply

    def _mixed(
        self, plan: StepPlan, adapters: Sequence[OnDevice | None], others: Mapping[Hashable, AdapterDeltas]
    ) -> torch.Tensor:
        packed = pack_tokens(plan, self._base.device)
        spans, size = spans_of(plan), self._config.page_tokens
        slots = [slot for span in spans for slot in span.slots(size)]
        slot = self._base.slot
        slot.step, slot.head = self._steps(plan, adapters, others)
        decoding = DecodeInputs(
            len(plan.decodes),
            max((-(-span.end // size) for span in spans[: len(plan.decodes)]), default=0),
            size,
            self._base.device,
        )
        if plan.decodes:
            decoding.fill(plan.decodes, adapters[: len(plan.decodes)])
        paged = self._forward.paged(
            torch.tensor(slots, dtype=torch.int64, device=self._base.device),
            decoded=decoding.seen if plan.decodes else None,
            longest=decoding.pages * size,
            chunks=chunks_of(spans[len(plan.decodes) :], self._base.device),
        )
        return self._forward.logits(packed.input_ids, packed.position_ids, packed.logit_rows, paged)

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

    def _count(self, path: str, runs: Sequence[Run]) -> None:
        self.paths[path] += sum(run.tokens * len(run.adapter.uses) for run in runs if run.adapter is not None)


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
