"""Adapters in the form that the engine applies, in the memory of one device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakValueDictionary

import torch

from overtone.adapters.packing import PackedParts, pack_deltas, packable_nbytes
from overtone.kernels import (
    Composer,
    CsrCore,
    Delta,
    Frame,
    ModulatedCore,
    PackedDeltas,
    PreparedCore,
    PreparedTerm,
    ResidentDelta,
    SharedMatrix,
    SparseCore,
    Term,
    packed_sum,
    prepare,
    prepared_nbytes,
)
from overtone.kernels.sparse import CsrPattern, pattern_key

Source = Literal["disk", "remote", "memory"]


@dataclass(frozen=True, slots=True, eq=False)
class ResidentAdapter:
    """One version in memory; equal only to itself. `nbytes`: of what is its own; `shared`: key -> bytes of what others may
    use as well; `source`: where it came from."""

    digest: str
    family: str
    deltas: Mapping[str, ResidentDelta]
    nbytes: int
    shared: Mapping[str, int] = field(default_factory=dict)
    source: Source = "disk"

    @property
    def whole_nbytes(self) -> int:
        """With what others may use as well."""
        return self.nbytes + sum(self.shared.values())


class SharedOnDevice:
    """Patterns and matrices on one device, each there once while an adapter uses it. Thread-safe."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.patterns: MutableMapping[str, CsrPattern] = WeakValueDictionary()
        self.packed = PackedParts()
        self._matrices: WeakValueDictionary[str, SharedMatrix] = WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def packs(self) -> bool:
        """Whether adapters of sparse cores are packed: native kernels read them where they lie in the host's memory."""
        return self.device is None or self.device.type == "cpu"

    def matrix(self, host: SharedMatrix) -> SharedMatrix:
        """`host` on the device. A matrix with more rows takes the place of one with fewer."""
        with self._lock:
            known = self._matrices.get(host.key)
            if known is None or len(known.matrix) < len(host.matrix):
                known = SharedMatrix(host.key, host.matrix.to(self.device))
                self._matrices[host.key] = known
            return known

    def term(self, term: Term) -> Term:
        """`term` with its shared matrices on the device."""
        core = term.core
        if isinstance(core, ModulatedCore):
            core = replace(core, basis=self.matrix(core.basis))
        return replace(term, analysis=self._frame(term.analysis), core=core, synthesis=self._frame(term.synthesis))

    def _frame(self, frame: Frame) -> Frame:
        return frame if frame.shared is None else replace(frame, shared=self.matrix(frame.shared))


def make_resident(
    digest: str,
    family: str,
    deltas: Mapping[str, Delta],
    on_device: SharedOnDevice | None = None,
    source: Source = "disk",
) -> ResidentAdapter:
    """`deltas` in the form that the engine applies, in the memory of a device; None: the CPU."""
    place = on_device or SharedOnDevice()
    packed = pack_deltas(deltas, place.packed) if place.packs else None
    if packed is not None:
        return packed_resident(digest, family, packed, source)
    prepared: dict[int, PreparedCore] = {}  # one core may serve many modules
    shared: dict[str, int] = {}
    ready = {}
    for name, delta in deltas.items():
        terms = []
        for host in delta.terms:
            term = place.term(host)
            shared |= _shared_bytes(term)
            # By the host's core, which lives as long as `deltas`: `term` may have one of its own, whose id the next gets.
            core = prepared.get(id(host.core))
            if core is None:
                core = prepared[id(host.core)] = prepare(term.core, place.device, place.patterns)
                if isinstance(term.core, SparseCore) and isinstance(core, CsrCore) and core.shared:
                    shared[pattern_key(term.core.pattern)] = core.pattern.nbytes
            gain = None if term.gain is None else term.gain.to(place.device, torch.float32)
            terms.append(PreparedTerm(term.analysis, core, term.synthesis, gain))
        ready[name] = ResidentDelta(tuple(terms))
    return ResidentAdapter(digest, family, ready, _own_bytes(ready), shared, source)


def packed_resident(digest: str, family: str, deltas: PackedDeltas, source: Source = "disk") -> ResidentAdapter:
    """What adapters share, the layout and patterns with a key, is counted as such."""
    return ResidentAdapter(digest, family, deltas, deltas.nbytes, _shared_parts(deltas), source)


def resident_nbytes(deltas: Mapping[str, Delta]) -> int:
    """`make_resident(...).nbytes` on the CPU, without making it."""
    packed = packable_nbytes(deltas)
    if packed is not None:
        return packed
    terms = [term for delta in deltas.values() for term in delta.terms]
    cores = {id(term.core): term.core for term in terms}
    gains = sum(term.gain.numel() for term in terms if term.gain is not None)
    return 4 * gains + sum(map(prepared_nbytes, cores.values()))


def shared_nbytes(contents: Mapping[str, Delta] | PackedDeltas) -> int:
    """Of the matrices that adapters to be made of these share, and of what packed ones do."""
    if isinstance(contents, PackedDeltas):
        return sum(_shared_parts(contents).values())
    terms = (term for delta in contents.values() for term in delta.terms)
    return sum({key: nbytes for term in terms for key, nbytes in _shared_bytes(term).items()}.values())


def mix(key: str, shares: Sequence[tuple[float, ResidentAdapter]]) -> ResidentAdapter:
    """One adapter whose deltas are the weighted sums of others': sum over i of w_i delta_W_i.

    key: what stands for its digest. What the parts share they share with the mix.
    """
    packed = packed_sum([(weight, adapter.deltas) for weight, adapter in shares])
    if packed is not None:
        return packed_resident(key, "mix", packed, "memory")
    modules = sorted({name for _, adapter in shares for name in adapter.deltas})
    composer = Composer()
    deltas = {
        name: ResidentDelta(
            composer.compose(
                (weight, term)
                for weight, adapter in shares
                if name in adapter.deltas
                for term in adapter.deltas[name].terms
            )
        )
        for name in modules
    }
    shared = {k: v for _, adapter in shares for k, v in adapter.shared.items()}
    return ResidentAdapter(key, "mix", deltas, _own_bytes(deltas), shared, "memory")


def _own_bytes(deltas: Mapping[str, ResidentDelta]) -> int:
    """Of cores, each once, and gains."""
    terms = [term for delta in deltas.values() for term in delta.terms]
    cores = {id(term.core): term.core for term in terms}
    gains = sum(term.gain.numel() for term in terms if term.gain is not None)
    return 4 * gains + sum(core.nbytes for core in cores.values())


def matrices_of(term: Term) -> Iterator[SharedMatrix]:
    """The shared matrices that a term uses."""
    for frame in (term.analysis, term.synthesis):
        if frame.shared is not None:
            yield frame.shared
    if isinstance(term.core, ModulatedCore):
        yield term.core.basis


def _shared_bytes(term: Term) -> dict[str, int]:
    return {m.key: m.matrix.numel() * m.matrix.element_size() for m in matrices_of(term)}


def _shared_parts(deltas: PackedDeltas) -> dict[str, int]:
    layout, patterns = deltas.layout, deltas.patterns
    shared = {f"layout {id(layout)}": layout.nbytes}  # another has the id only when no adapter has this layout any more
    return shared | {f"packed {patterns.key}": patterns.nbytes} if patterns.key else shared
