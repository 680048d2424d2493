"""Which terms of a batch's adapters can be applied together, and what the composition of a batch determines.

Terms of one channel share their frames and the kind of their core: one analysis, one pass over the cores, one synthesis for
all rows that have such a term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from overtone.kernels import BagPlan, CsrCore, Frame, PreparedCore, plan_bags


class PreparedTerm(Protocol):
    """One summand of an adapter's change of one layer, ready to be applied (see `overtone.kernels.Term`)."""

    @property
    def analysis(self) -> Frame: ...
    @property
    def core(self) -> PreparedCore: ...
    @property
    def synthesis(self) -> Frame: ...
    @property
    def gain(self) -> torch.Tensor | None: ...


class PreparedDelta(Protocol):
    @property
    def terms(self) -> Sequence[PreparedTerm]: ...


AdapterDeltas = Mapping[str, PreparedDelta]
"""Module name -> delta: what an adapter is to a model."""


class Channel(NamedTuple):
    """layer: an adapter with several such terms on a module has them in different layers, so that no row has two."""

    analysis: Frame
    core: type
    synthesis: Frame
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What of an adapter decides how it is batched."""

    deltas: AdapterDeltas
    frames: frozenset[Frame]
    modules: Mapping[str, Mapping[Channel, PreparedTerm]]


def outline(deltas: AdapterDeltas) -> Outline:
    modules = {name: _by_channel(delta) for name, delta in deltas.items()}
    frames = frozenset(channel.analysis for channels in modules.values() for channel in channels)
    return Outline(deltas, frames, modules)


def _by_channel(delta: PreparedDelta) -> dict[Channel, PreparedTerm]:
    seen: Counter[tuple[Frame, type, Frame]] = Counter()
    channels = {}
    for term in delta.terms:
        kind = (term.analysis, type(term.core), term.synthesis)
        channels[Channel(*kind, seen[kind])] = term
        seen[kind] += 1
    return channels


def channels_of(outlines: Sequence[Outline]) -> dict[str, list[Channel]]:
    """Which channels each module needs for these adapters."""
    modules: dict[str, dict[Channel, None]] = {}
    for one in dict.fromkeys(outlines):
        for name, channels in one.modules.items():
            modules.setdefault(name, {}).update(dict.fromkeys(channels))
    return {name: list(channels) for name, channels in modules.items()}


Run = tuple[torch.Tensor, PreparedTerm]
"""Rows that share a term: (n,) int64."""


class DecodeBatch:
    """The adapters of the sequences that decode together, with what their composition determines.

    modules: module name -> the channels that some adapter needs there. Plans are made as the modules are reached.
    """

    def __init__(self, outlines: Sequence[Outline], device: torch.device) -> None:
        self.outlines = list(outlines)
        self.modules = channels_of(self.outlines)
        self._device = device
        self._lanes: dict[Frame, list[Outline]] = {}
        self._bags: dict[tuple[str, Channel], BagPlan | None] = {}
        self._runs: dict[tuple[str, Channel], list[Run]] = {}

    def composed_of(self, adapters: Sequence[AdapterDeltas]) -> bool:
        # By identity, the references held: a recycled id() cannot bring back the plans of another adapter.
        known = (one.deltas for one in self.outlines)
        return len(adapters) == len(self.outlines) and all(a is b for a, b in zip(adapters, known, strict=True))

    def lane(self, frame: Frame) -> list[Outline]:
        """The adapters that use this analysis frame anywhere, in the order of their rows."""
        lane = self._lanes.get(frame)
        if lane is None:
            lane = self._lanes[frame] = [one for one in self.outlines if frame in one.frames]
        return lane

    def bags(self, module: str, channel: Channel) -> BagPlan | None:
        """The sparse cores of a channel over the rows of its lane; None if no row has one."""
        key = module, channel
        if key not in self._bags:
            terms = [one.modules.get(module, {}).get(channel) for one in self.lane(channel.analysis)]
            cores = [term.core if term is not None and isinstance(term.core, CsrCore) else None for term in terms]
            shape = next((core.shape for core in cores if core is not None), None)
            self._bags[key] = None if shape is None else plan_bags(cores, shape)
        return self._bags[key]

    def runs(self, module: str, channel: Channel) -> list[Run]:
        """The rows of the lane by the term that they have in this channel."""
        key = module, channel
        if key not in self._runs:
            rows: dict[int, tuple[list[int], PreparedTerm]] = {}
            for row, one in enumerate(self.lane(channel.analysis)):
                term = one.modules.get(module, {}).get(channel)
                if term is not None:
                    rows.setdefault(id(term), ([], term))[0].append(row)
            self._runs[key] = [(torch.tensor(r, device=self._device), term) for r, term in rows.values()]
        return self._runs[key]


class BatchCache:
    """Keeps the last `DecodeBatch`: it stays valid from step to step until a sequence comes or goes."""

    def __init__(self) -> None:
        self._batch: DecodeBatch | None = None
        self._outlines: dict[int, Outline] = {}

    def outlines(self, adapters: Sequence[AdapterDeltas]) -> list[Outline]:
        """One per adapter; those of this step and of the last batch are remembered."""
        kept = self._batch.outlines if self._batch is not None else []
        known = {id(one.deltas): one for one in [*kept, *self._outlines.values()]}
        found = {id(a): known.get(id(a)) or outline(a) for a in adapters}
        self._outlines = found
        return [found[id(a)] for a in adapters]

    def batch(self, outlines: Sequence[Outline], device: torch.device) -> DecodeBatch:
        if self._batch is None or not self._batch.composed_of([one.deltas for one in outlines]):
            self._batch = DecodeBatch(outlines, device)
        return self._batch
