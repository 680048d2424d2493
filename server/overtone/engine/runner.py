"""One step through the model: packed tokens in, logits out. Owns the KV cache's memory; knows nothing of the queue."""

from __future__ import annotations

from collections import Counter

import torch

from overtone.engine.batch import pack_tokens, place_tokens
from overtone.engine.config import EngineConfig
from overtone.engine.logprobs import prompt_rows
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.models.adapter_rows import PATHS, AdapterRows
from overtone.models.adapter_step import AdapterStep
from overtone.models.base import BaseModel
from overtone.models.blocked_step import BlockedStep
from overtone.models.lanes import Segment


class ModelRunner:
    """Runs step plans on a base model. Used by one thread, which from then on computes with `threads`; 0: as it does."""

    def __init__(self, base: BaseModel, config: EngineConfig, threads: int = 0) -> None:
        assert config.deterministic or not base.deterministic, "the prefix cache would share what answers computed"
        self._base = base
        self._threads = threads
        self._page_tokens = config.page_tokens
        slots = (config.cache_pages + 1) * config.page_tokens
        # Zeroed memory is not touched until it is written, so an idle cache costs nothing.
        self._cache = torch.zeros(
            base.num_layers, slots, 2, base.num_kv_heads, base.head_dim, dtype=base.dtype, device=base.device
        )
        self.paths = Counter(dict.fromkeys(PATHS, 0))
        """Rows times modules by how adapters were applied to them (see `AdapterRows`), since the start."""
        self.forget()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits (S + P, vocabulary) in the model's dtype: of the chunks that complete, in the plan's order, then of the
        prompt tokens that `prompt_rows` names. S + P is at most the step's tokens."""
        if self._threads:
            torch.set_num_threads(self._threads)  # a setting of the thread that makes it
            self._threads = 0
        self._clear(plan.fresh_pages)
        tokens = pack_tokens(plan, self._base.device)
        slot = self._base.slot
        try:
            slot.step, slot.head = self._adapter_steps(plan)
            output = self._base.model(
                input_ids=tokens.input_ids,
                position_ids=tokens.position_ids,
                use_cache=False,
                logits_to_keep=tokens.logit_rows,
                paged=place_tokens(
                    plan,
                    self._cache,
                    self._page_tokens,
                    self._base.windows,
                    canonical=self._base.deterministic,
                    native=slot.native,
                ),
            )
        except BaseException:
            # What was being prepared for the batch's adapters may be half done.
            self.forget()
            raise
        finally:
            slot.step = slot.head = None
        logits: torch.Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        """Nothing of it runs by itself."""

    def forget(self) -> None:
        """Lets go of the adapters of the last batch: their leases have ended."""
        self._rows, self._head_rows = (
            AdapterRows(self._base.device, self.paths, self._base.slot.native) for _ in range(2)
        )

    def _clear(self, pages: tuple[int, ...]) -> None:
        """A recycled page may hold another request's NaN, and 0 * NaN would reach its next owner."""
        if pages:
            paged = self._cache.view(len(self._cache), -1, self._page_tokens, *self._cache.shape[2:])
            paged.index_fill_(1, torch.tensor(pages, device=self._cache.device), 0)

    def _adapter_steps(
        self, plan: StepPlan
    ) -> tuple[AdapterStep | BlockedStep | None, AdapterStep | BlockedStep | None]:
        """For the layers, which see all tokens, and for the head, which sees those whose logits somebody needs."""
        decodes = [Segment(1, chunk.sequence.request.adapter) for chunk in plan.decodes]
        prefills = [Segment(chunk.length, chunk.sequence.request.adapter, _ahead(chunk)) for chunk in plan.prefills]
        ends = [Segment(1, chunk.sequence.request.adapter) for chunk in plan.chunks if chunk.completes]
        asked = [
            Segment(len(rows), chunk.sequence.request.adapter)
            for chunk in plan.prefills
            if (rows := prompt_rows(chunk))
        ]
        step, head = self._adapter_step(decodes, prefills, self._rows), self._adapter_step(ends, asked, self._head_rows)
        return (None if step.empty else step), (None if head.empty else head)

    def _adapter_step(
        self, decodes: list[Segment], prefills: list[Segment], kept: AdapterRows
    ) -> AdapterStep | BlockedStep:
        form = BlockedStep if self._base.deterministic else AdapterStep
        return form(decodes, prefills, self._base.frames, kept)


def _ahead(chunk: Chunk) -> int:
    """Tokens of the chunk's sequence that are still to be computed after it."""
    return chunk.sequence.pending - chunk.length
