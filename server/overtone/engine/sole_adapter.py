"""When one adapter has the model to itself for so long that it pays to merge it into the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch

from overtone.engine.scheduler import StepPlan
from overtone.kernels import CsrCore, PackedDeltas
from overtone.kernels.prepared import PreparedLowRank
from overtone.models.base import BaseModel
from overtone.models.channels import AdapterDeltas, PreparedTerm
from overtone.models.device.moved import moved_to
from overtone.models.merged import MergeCost, MergedWeights, merge_pays

log = logging.getLogger(__name__)

_NEVER = MergeCost(math.inf, 0.0)
_LEAST_ROOM = 512 << 20
"""Bytes that stay free, at least."""


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
        self._tokens, self._cost = 0, _NEVER
        self._merged = False

    @property
    def merged(self) -> bool:
        return self._merged

    def serves(self, plan: StepPlan) -> bool:
        """Looks at a step that is about to run; whether the weights have its adapter merged, so that nothing is to be
        added. What is merged stays while nothing runs: a key names contents."""
        keys = {chunk.sequence.request.adapter_key for chunk in plan.chunks}
        adapter = plan.chunks[0].sequence.request.adapter
        key = keys.pop() if len(keys) == 1 and adapter is not None else ""
        if key != self._key or not key:
            self._begin(key, adapter)
        self._tokens += sum(chunk.length for chunk in plan.chunks)
        if not self._merged and adapter is not None and merge_pays(self._tokens, [self._cost]):
            self._merge(adapter)
        return self._merged

    def give_up(self) -> None:
        """The memory is needed: the weights are clean, the copies gone, and this adapter is not merged again."""
        self._begin(self._key, None)

    def _begin(self, key: str, adapter: AdapterDeltas | None) -> None:
        if self._merged:
            self._weights.unmerge()
            self._weights.forget()
        self._key, self._tokens, self._merged = key, 0, False
        self._cost = cost_of(adapter, self._modules) if key and adapter is not None else _NEVER

    def _merge(self, adapter: AdapterDeltas) -> None:
        self._merged = self._fits(adapter)
        if not self._merged:
            self._cost = _NEVER  # nor will it fit at the next step
            return
        try:
            self._weights.merge(moved_to(adapter, self._device))
        except Exception as error:  # weights that cannot be overwritten; no memory
            log.warning("an adapter is served beside the weights, not merged into them: %s", error)
            self._merged, self._cost = False, _NEVER

    def _fits(self, adapter: AdapterDeltas) -> bool:
        if self._device.type != "cuda":
            return True
        sizes = [p * q for p, q in (self._modules[name] for name in adapter)]
        free, total = torch.cuda.mem_get_info(self._device)
        # Beside the copies, one layer's change is made in float32, and later steps want room as well.
        return free > self._bytes * sum(sizes) + 8 * max(sizes) + max(_LEAST_ROOM, total // 32)


def cost_of(adapter: AdapterDeltas, modules: Mapping[str, tuple[int, int]]) -> MergeCost:
    """Of all its layers; one that never pays if there is a term whose cost is not known."""
    if isinstance(adapter, PackedDeltas):
        costs = _packed_costs(adapter, modules)
    else:
        costs = [
            _cost(term, modules[name]) if name in modules else None
            for name, delta in adapter.items()
            for term in delta.terms
        ]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return _NEVER
    return MergeCost(sum(cost.once for cost in known), sum(cost.token for cost in known))


def _cost(term: PreparedTerm, shape: tuple[int, int]) -> MergeCost | None:
    if term.gain is not None:
        return None
    if isinstance(term.core, CsrCore):
        return MergeCost.spectral(shape, int(term.core.pattern.pointers.diff().count_nonzero()))
    if isinstance(term.core, PreparedLowRank):
        return MergeCost.low_rank(shape, len(term.core.up))
    return None


def _packed_costs(adapter: PackedDeltas, modules: Mapping[str, tuple[int, int]]) -> list[MergeCost | None]:
    """Of the terms, none of which is made."""
    names = [name for name, terms in adapter.layout.modules.items() for _ in terms]
    return [
        MergeCost.spectral(modules[name], rows) if name in modules else None
        for name, rows in zip(names, adapter.filled_rows().tolist(), strict=True)
    ]
