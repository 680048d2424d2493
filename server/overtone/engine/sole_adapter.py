"""When one adapter has the model to itself for so long that it pays to merge it into the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from overtone.engine.scheduler import StepPlan
from overtone.errors import UnsupportedModel
from overtone.kernels import CsrCore
from overtone.kernels.prepared import PreparedLowRank
from overtone.models.base import BaseModel
from overtone.models.channels import AdapterDeltas, PreparedTerm
from overtone.models.device.moved import moved_to
from overtone.models.merged import MergeCost, MergedWeights, merge_pays

log = logging.getLogger(__name__)


class SoleAdapter:
    """Merges an adapter once its requests alone have taken as many tokens as the merge costs, and takes it out before any
    other row is computed: so merging never costs more than twice what the best choice in hindsight would have.

    The clean copies of changed weights lie beside them: only adapters whose copies fit there beside all else are merged.
    """

    def __init__(self, base: BaseModel) -> None:
        self._modules: Mapping[str, tuple[int, int]] = base.modules
        self._weights = MergedWeights(base.model, base.frames, base.device)
        self._bytes, self._device = base.dtype.itemsize, base.device
        base.slot.merged = self._weights
        self._key = ""
        self._tokens, self._costs = 0, list[MergeCost]()

    @property
    def merged(self) -> bool:
        return self._weights.merged is not None

    def serves(self, plan: StepPlan) -> bool:
        """Looks at a step that is about to run; whether the weights have its adapter merged, so that nothing is to be
        added. What is merged stays while nothing runs: a key names contents."""
        keys = {chunk.sequence.request.adapter_key for chunk in plan.chunks}
        adapter = plan.chunks[0].sequence.request.adapter
        key = keys.pop() if len(keys) == 1 and adapter is not None else ""
        if key != self._key or not key:
            self._begin(key, adapter)
        self._tokens += sum(chunk.length for chunk in plan.chunks)
        pays = not self.merged and self._costs and merge_pays(self._tokens, self._costs)
        if pays and adapter is not None and self._fits(adapter):
            self._merge(adapter)
        return self.merged

    def _begin(self, key: str, adapter: AdapterDeltas | None) -> None:
        if self.merged:
            self._weights.unmerge()
            self._weights.forget()
        self._key, self._tokens = key, 0
        self._costs = costs_of(adapter, self._modules) if key and adapter is not None else []

    def _merge(self, adapter: AdapterDeltas) -> None:
        try:
            self._weights.merge(moved_to(adapter, self._device))
        except (UnsupportedModel, RuntimeError) as error:  # weights that cannot be overwritten; no memory
            log.warning("an adapter is served beside the weights, not merged into them: %s", error)
            self._costs = []

    def _fits(self, adapter: AdapterDeltas) -> bool:
        if self._device.type != "cuda":
            return True
        needed = self._bytes * sum(p * q for p, q in (self._modules[name] for name in adapter))
        free, _ = torch.cuda.mem_get_info(self._device)
        # Beside the copies one layer's change is made in float32.
        return free > needed + 8 * max(p * q for p, q in (self._modules[name] for name in adapter))


def costs_of(adapter: AdapterDeltas, modules: Mapping[str, tuple[int, int]]) -> list[MergeCost]:
    """Of its layers; empty if one has a term whose cost is not known: it is not to be merged."""
    costs: list[MergeCost] = []
    for name, delta in adapter.items():
        for term in delta.terms:
            cost = _cost(term, modules[name]) if name in modules else None
            if cost is None:
                return []
            costs.append(cost)
    return costs


def _cost(term: PreparedTerm, shape: tuple[int, int]) -> MergeCost | None:
    if term.gain is not None:
        return None
    if isinstance(term.core, CsrCore):
        return MergeCost.spectral(shape, int(term.core.pattern.pointers.diff().count_nonzero()))
    if isinstance(term.core, PreparedLowRank):
        return MergeCost.low_rank(shape, len(term.core.up))
    return None
