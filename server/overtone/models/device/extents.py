"""From an adapter in the host's memory to the extent that the Triton kernels read (`overtone.kernels.gpu.records`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from overtone.kernels import CsrCore, FrameKind, PackedDeltas, PackedLayout, PackedTerm, SharedMatrix
from overtone.kernels.gpu.many_placed import MOST_ENTRIES, Tables
from overtone.kernels.gpu.placing import spectral_core
from overtone.kernels.gpu.plans import FrameName, Plan, make_plan
from overtone.kernels.gpu.records import ALIGNMENT, Extent, expand_record, extent_of, pair_record
from overtone.kernels.prepared import PreparedDense, PreparedLowRank
from overtone.models.channels import AdapterDeltas, PreparedTerm
from overtone.models.device.packed_extents import ExtentLayout, Placed

SPECTRAL: Mapping[FrameKind, FrameName] = {FrameKind.DCT: "dct", FrameKind.DFT: "dft"}
PAIR, EXPAND = "pair", "expand"
KINDS = (*SPECTRAL.values(), PAIR, EXPAND)
_FRAMES: Mapping[str, FrameName] = {name: name for name in SPECTRAL.values()}
_MOST_COLUMNS = 1 << 16
"""Columns of a spectral record have 16 bits."""


class Plans:
    """The transforms of one device, made when they are first asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._known: dict[tuple[str, int, bool], Plan | None] = {}

    def of(self, frame: str, size: int, *, inverse: bool) -> Plan | None:
        """frame: "dct" or "dft"; None: the kernels have no transform of this size."""
        key = frame, size, inverse
        if key not in self._known:
            self._known[key] = make_plan(size, self.dtype, self.device, inverse=inverse, frame=_FRAMES[frame])
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Use:
    """That an adapter changes a layer by records of a kind. rank: of a pair or an expansion, rounded up to a power of two
    from 8 on, which bounds launches; 0: of a spectral record."""

    kind: str
    module: str
    rank: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """An adapter ready to be copied to the device. projections: of its expansions, by module, on the host."""

    extent: Extent
    uses: frozenset[Use]
    projections: Mapping[str, SharedMatrix] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Words that it takes; an adapter that changes nothing has a place too."""
        return max(ALIGNMENT, len(self.extent.words))


class Packer:
    """modules: (p, q) by name, in the order of their slots."""

    def __init__(self, modules: Mapping[str, tuple[int, int]], plans: Plans) -> None:
        self._plans, self._modules = plans, modules
        self.slots = {name: slot for slot, name in enumerate(modules)}
        self._uses: dict[frozenset[Use], frozenset[Use]] = {}  # of equal sets one object
        # Places are the same on any device: packing needs no tables there.
        self._places = Plans(torch.float32, torch.device("cpu"))
        self._tables: dict[tuple[str, tuple[int, int]], Tables] = {}
        self._layouts: WeakKeyDictionary[PackedLayout, tuple[ExtentLayout, frozenset[Use]] | None] = WeakKeyDictionary()

    def pack(self, deltas: AdapterDeltas) -> Packed | None:
        """None: it has a term that no kernel here applies. Runs on any thread, but on one at a time."""
        if isinstance(deltas, PackedDeltas) and deltas.layout.entries <= MOST_ENTRIES:
            return self._pack_together(deltas)
        kinds: dict[str, dict[int, torch.Tensor]] = {}
        uses: set[Use] = set()
        projections: dict[str, SharedMatrix] = {}
        made: dict[int, torch.Tensor] = {}  # one core may serve many modules
        for module, delta in deltas.items():
            for term in delta.terms:
                use = self._use(module, term)
                if use is None or self.slots[module] in kinds.get(use.kind, {}):
                    return None
                if use.kind == EXPAND:
                    assert term.analysis.shared is not None
                    projections[module] = term.analysis.shared
                record = made.get(id(term.core)) if use.kind in (EXPAND, PAIR) else None
                if record is None:
                    record = made[id(term.core)] = self._record(use, term)
                kinds.setdefault(use.kind, {})[self.slots[module]] = record
                uses.add(use)
        return Packed(extent_of(len(self.slots), kinds), self._agreed(uses), projections)

    def _pack_together(self, deltas: PackedDeltas) -> Packed | None:
        if deltas.layout not in self._layouts:
            self._layouts[deltas.layout] = self._extent_layout(deltas.layout)
        known = self._layouts[deltas.layout]
        if known is None:
            return None
        layout, uses = known
        values = torch.float32 if self._plans.dtype is torch.float32 else torch.float16
        return Packed(layout.extent(deltas, len(self.slots), values), uses)

    def _extent_layout(self, layout: PackedLayout) -> tuple[ExtentLayout, frozenset[Use]] | None:
        """None: it has a term that no kernel here applies."""
        placed: dict[Use, Placed] = {}
        for module, terms in layout.modules.items():
            for term in terms:
                use = self._spectral_use(module, term)
                if use is None or use in placed:
                    return None
                placed[use] = Placed(use.kind, self.slots[module], self._tables_of(use))
        return ExtentLayout(layout, list(placed.values())), self._agreed(placed)

    def _tables_of(self, use: Use) -> Tables:
        """One object for all modules of a shape."""
        key = use.kind, self._modules[use.module]
        if key not in self._tables:
            self._tables[key] = Tables.of(*self._plans_of(use))
        return self._tables[key]

    def _agreed(self, uses: Iterable[Use]) -> frozenset[Use]:
        found = frozenset(uses)
        return self._uses.setdefault(found, found)

    def _spectral_use(self, module: str, term: PreparedTerm | PackedTerm) -> Use | None:
        kind = SPECTRAL.get(term.analysis.kind)
        if module not in self.slots or kind is None or term.synthesis.kind is not term.analysis.kind:
            return None
        return Use(kind, module) if self._transforms(kind, *self._modules[module]) else None

    def _use(self, module: str, term: PreparedTerm) -> Use | None:
        core, frames = term.core, (term.analysis.kind, term.synthesis.kind)
        if module not in self.slots or term.gain is not None:
            return None
        if isinstance(core, CsrCore):
            return self._spectral_use(module, term)
        if isinstance(core, PreparedLowRank) and frames == (FrameKind.IDENTITY, FrameKind.IDENTITY):
            return Use(PAIR, module, bounded(len(core.up)))
        if isinstance(core, PreparedDense) and frames == (FrameKind.PROJECTION, FrameKind.IDENTITY):
            return Use(EXPAND, module, bounded(core.shape[1]))
        return None

    def _transforms(self, kind: str, p: int, q: int) -> bool:
        there = self._places.of(kind, q, inverse=False), self._places.of(kind, p, inverse=True)
        return None not in there and q < _MOST_COLUMNS

    def _record(self, use: Use, term: PreparedTerm) -> torch.Tensor:
        core, dtype = term.core, self._plans.dtype
        if isinstance(core, PreparedLowRank):
            return pair_record(core.down.cpu(), core.up.cpu(), dtype)
        if isinstance(core, PreparedDense):
            return expand_record(core.matrix.T.contiguous().cpu(), dtype)
        assert isinstance(core, CsrCore)
        values = torch.float32 if dtype is torch.float32 else torch.float16
        places, shape = (core.rows.cpu(), core.cols.cpu()), self._modules[use.module]
        return spectral_core(*places, core.values.cpu(), shape, *self._plans_of(use), values)

    def _plans_of(self, use: Use) -> tuple[Plan, Plan]:
        p, q = self._modules[use.module]
        forward, inverse = self._places.of(use.kind, q, inverse=False), self._places.of(use.kind, p, inverse=True)
        assert forward is not None
        assert inverse is not None
        return forward, inverse


def bounded(rank: int) -> int:
    """The power of two from 8 on that `rank` fits in."""
    return max(8, 1 << (rank - 1).bit_length())
