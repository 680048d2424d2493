"""Which terms of a batch's adapters can be applied together.

Terms of one channel share their frames and the kind of their core: one analysis, one pass over the cores, one synthesis for
all rows that have such a term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from overtone.kernels import Frame, PreparedCore


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


@dataclass(frozen=True, slots=True)
class Channel:
    """gained: whether its terms have a gain; layer: an adapter with several such terms on a module has them in different
    layers, so that no row has two."""

    analysis: Frame
    core: type
    synthesis: Frame
    gained: bool
    layer: int
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.analysis, self.core, self.synthesis, self.gained, self.layer
        object.__setattr__(self, "_hash", hash(parts))  # asked for at every layer

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What of an adapter decides how it is batched. addresses: see `overtone.models.native_rows`."""

    deltas: AdapterDeltas
    frames: frozenset[Frame]
    modules: Mapping[str, Mapping[Channel, PreparedTerm]]
    addresses: dict[Channel, torch.Tensor] = field(default_factory=dict)


def outline(deltas: AdapterDeltas) -> Outline:
    modules = {name: _by_channel(delta) for name, delta in deltas.items()}
    frames = frozenset(channel.analysis for channels in modules.values() for channel in channels)
    return Outline(deltas, frames, modules)


def _by_channel(delta: PreparedDelta) -> dict[Channel, PreparedTerm]:
    seen: Counter[tuple[Frame, type, Frame, bool]] = Counter()
    channels = {}
    for term in delta.terms:
        kind = (term.analysis, type(term.core), term.synthesis, term.gain is not None)
        channels[Channel(*kind, seen[kind])] = term
        seen[kind] += 1
    return channels


class Outlines:
    """The outlines of the adapters in use; one per adapter, kept as long as it is asked for."""

    def __init__(self) -> None:
        self._known: dict[int, Outline] = {}

    def of(self, adapters: Sequence[AdapterDeltas | None]) -> list[Outline | None]:
        # By identity, the references held in the outlines: a recycled id() cannot bring back those of another adapter.
        known = self._known
        self._known = {id(a): known.get(id(a)) or outline(a) for a in adapters if a is not None}
        return [None if a is None else self._known[id(a)] for a in adapters]
