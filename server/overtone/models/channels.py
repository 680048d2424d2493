"""Which terms of a batch's adapters can be applied together.

Terms of one channel share their frames and the kind of their core: one analysis, one pass over the cores, one synthesis for
all rows that have such a term.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias
from weakref import WeakValueDictionary

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


@dataclass(frozen=True, slots=True, weakref_slot=True)
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


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Layout:
    """The channels that an adapter has at each module: one object for all adapters in use that agree in them."""

    modules: Mapping[str, tuple[Channel, ...]]
    frames: frozenset[Frame]


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What of an adapter decides how it is batched. addresses: see `overtone.models.native_rows`."""

    deltas: AdapterDeltas
    layout: Layout
    modules: Mapping[str, Mapping[Channel, PreparedTerm]]
    addresses: dict[Channel, torch.Tensor] = field(default_factory=dict)


def channels_by_module(outlines: Iterable[Outline]) -> Mapping[str, Collection[Channel]]:
    """Of all `outlines` together."""
    layouts = dict.fromkeys(one.layout for one in outlines)
    if len(layouts) == 1:  # mostly
        return next(iter(layouts)).modules
    merged: dict[str, dict[Channel, None]] = {}
    for layout in layouts:
        for name, channels in layout.modules.items():
            merged.setdefault(name, {}).update(dict.fromkeys(channels))
    return merged


class Outlines:
    """The outlines of the adapters in use; one per adapter, kept as long as it is asked for."""

    def __init__(self) -> None:
        self._known: dict[int, Outline] = {}
        # Of what is equal one object, found at once by its identity, as long as some outline has it.
        self._channels: WeakValueDictionary[_Kind, Channel] = WeakValueDictionary()
        self._layouts: WeakValueDictionary[tuple[object, ...], Layout] = WeakValueDictionary()

    def of(self, adapters: Sequence[AdapterDeltas | None]) -> list[Outline | None]:
        # By identity, the references held in the outlines: a recycled id() cannot bring back those of another adapter.
        known, each = self._known, {id(a): a for a in adapters if a is not None}
        self._known = {key: known.get(key) or self._outline(a) for key, a in each.items()}
        return [None if a is None else self._known[id(a)] for a in adapters]

    def _outline(self, deltas: AdapterDeltas) -> Outline:
        modules = {name: self._by_channel(delta) for name, delta in deltas.items()}
        each = {name: tuple(channels) for name, channels in modules.items()}
        key = tuple(each.items())
        layout = self._layouts.get(key)
        if layout is None:
            frames = frozenset(channel.analysis for channels in each.values() for channel in channels)
            layout = self._layouts[key] = Layout(each, frames)
        return Outline(deltas, layout, modules)

    def _by_channel(self, delta: PreparedDelta) -> dict[Channel, PreparedTerm]:
        found: dict[Channel, PreparedTerm] = {}
        for term in delta.terms:
            layer = 0
            while (channel := self._channel(term, layer)) in found:
                layer += 1
            found[channel] = term
        return found

    def _channel(self, term: PreparedTerm, layer: int) -> Channel:
        kind = term.analysis, type(term.core), term.synthesis, term.gain is not None, layer
        channel = self._channels.get(kind)
        if channel is None:
            channel = self._channels[kind] = Channel(*kind)
        return channel


_Kind: TypeAlias = tuple[Frame, type, Frame, bool, int]
