"""Which terms of a batch's adapters can be applied together.

Terms of one channel share their frames and the kind of their core: one analysis, one pass over the cores, one synthesis for
all rows that have such a term.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels import CsrCore, Frame, PackedDeltas, PackedLayout, PackedTerm, PreparedCore


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
    """What of an adapter decides how it is batched. modules: its terms, each the same object as long as the outline lives;
    addresses: see `overtone.models.core_tables`."""

    deltas: AdapterDeltas
    layout: Layout
    modules: Mapping[str, Mapping[Channel, PreparedTerm]]
    addresses: dict[Channel, NDArray[np.int64]] = field(default_factory=dict)


class PackedTerms(Mapping[str, Mapping[Channel, PreparedTerm]]):
    """`Outline.modules` of packed deltas: the terms of a module are made when they are first asked for, and then kept."""

    def __init__(self, deltas: PackedDeltas, layout: Layout) -> None:
        self._deltas, self._layout = deltas, layout
        self._made: dict[str, Mapping[Channel, PreparedTerm]] = {}

    def __getitem__(self, module: str) -> Mapping[Channel, PreparedTerm]:
        made = self._made.get(module)
        if made is None:
            channels = self._layout.modules[module]  # in the order of the terms
            made = self._made[module] = dict(zip(channels, self._deltas[module].terms, strict=True))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.modules)

    def __len__(self) -> int:
        return len(self._layout.modules)


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
        self._packed: WeakKeyDictionary[PackedLayout, Layout] = WeakKeyDictionary()

    def of(self, adapters: Sequence[AdapterDeltas | None]) -> list[Outline | None]:
        # By identity, the references held in the outlines: a recycled id() cannot bring back those of another adapter.
        known, each = self._known, {id(a): a for a in adapters if a is not None}
        self._known = {key: known.get(key) or self._outline(a) for key, a in each.items()}
        return [None if a is None else self._known[id(a)] for a in adapters]

    def _outline(self, deltas: AdapterDeltas) -> Outline:
        if isinstance(deltas, PackedDeltas):
            layout = self._packed.get(deltas.layout)
            if layout is None:
                layout = self._packed[deltas.layout] = self._layout(
                    {name: self._channels_of(terms) for name, terms in deltas.layout.modules.items()}
                )
            return Outline(deltas, layout, PackedTerms(deltas, layout))
        each = {name: self._channels_of(delta.terms) for name, delta in deltas.items()}
        modules = {name: dict(zip(each[name], delta.terms, strict=True)) for name, delta in deltas.items()}
        return Outline(deltas, self._layout(each), modules)

    def _layout(self, each: Mapping[str, tuple[Channel, ...]]) -> Layout:
        key = tuple(each.items())
        layout = self._layouts.get(key)
        if layout is None:
            frames = frozenset(channel.analysis for channels in each.values() for channel in channels)
            layout = self._layouts[key] = Layout(each, frames)
        return layout

    def _channels_of(self, terms: Sequence[PreparedTerm | PackedTerm]) -> tuple[Channel, ...]:
        """One for each term."""
        found: dict[Channel, None] = {}
        for term in terms:
            layer = 0
            while (channel := self._channel(term, layer)) in found:
                layer += 1
            found[channel] = None
        return tuple(found)

    def _channel(self, term: PreparedTerm | PackedTerm, layer: int) -> Channel:
        if isinstance(term, PackedTerm):
            kind: _Kind = term.analysis, CsrCore, term.synthesis, False, layer
        else:
            kind = term.analysis, type(term.core), term.synthesis, term.gain is not None, layer
        channel = self._channels.get(kind)
        if channel is None:
            channel = self._channels[kind] = Channel(*kind)
        return channel


_Kind: TypeAlias = tuple[Frame, type, Frame, bool, int]
