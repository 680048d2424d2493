"""One forward pass's view of the adapters: which packed tokens belong to which, and what that adds to a layer.

    y = W x + sum over frames of S^T (K_a (A x))        a: the adapter of the token's request

The analysis A x is computed once per distinct input (q, k and v share it, gate and up too), only for tokens that have an
adapter, for all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from overtone.kernels import BagPlan, CsrCore, DctFrame, FrameKind, SparseStep, plan_bags


class PreparedDelta(Protocol):
    """One adapter's change of one linear layer, ready to be applied (see `overtone.kernels.Delta`)."""

    @property
    def analysis(self) -> FrameKind: ...
    @property
    def core(self) -> CsrCore: ...
    @property
    def synthesis(self) -> FrameKind: ...


AdapterDeltas = Mapping[str, PreparedDelta]
"""Module name -> delta: what an adapter is to a model."""

Channel = tuple[FrameKind, FrameKind]
"""Analysis and synthesis frame: deltas of one channel share their transforms."""


class FrameBank:
    """The frames of one device, by kind and size, built on first use and shared by all layers and adapters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._frames: dict[tuple[FrameKind, int], DctFrame] = {}

    def get(self, kind: FrameKind, size: int) -> DctFrame:
        frame = self._frames.get((kind, size))
        if frame is None:
            frame = self._frames[kind, size] = {FrameKind.DCT: DctFrame}[kind](size, self.device)
        return frame


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed tokens of one request: its decoded token or a chunk of its prompt. None: the base model."""

    tokens: int
    deltas: AdapterDeltas | None


class DecodeBatch:
    """The adapters of the sequences that decode together, with what their composition determines.

    modules: module name -> the channels that some adapter needs there; plans: filled as the modules are reached.
    """

    def __init__(self, adapters: Sequence[AdapterDeltas]) -> None:
        self.adapters = list(adapters)
        self.modules = _channels(self.adapters)
        self.plans: dict[tuple[str, Channel], BagPlan | None] = {}

    def composed_of(self, adapters: Sequence[AdapterDeltas]) -> bool:
        # By identity, the references held: a recycled id() cannot bring back the plans of another adapter.
        return len(adapters) == len(self.adapters) and all(a is b for a, b in zip(adapters, self.adapters, strict=True))


class BagCache:
    """Keeps the last `DecodeBatch`: it stays valid from step to step until a sequence comes or goes."""

    def __init__(self) -> None:
        self._batch = DecodeBatch([])

    def batch(self, adapters: Sequence[AdapterDeltas]) -> DecodeBatch:
        if not self._batch.composed_of(adapters):
            self._batch = DecodeBatch(adapters)
        return self._batch


def _channels(adapters: Sequence[AdapterDeltas]) -> dict[str, list[Channel]]:
    """Which channels each module needs for these adapters."""
    modules: dict[str, dict[Channel, None]] = {}
    for deltas in {id(deltas): deltas for deltas in adapters}.values():
        for name, delta in deltas.items():
            modules.setdefault(name, {})[delta.analysis, delta.synthesis] = None
    return {name: list(channels) for name, channels in modules.items()}


class AdapterStep:
    """What one forward pass knows of adapters. `decodes` come first in the packed tokens, then `prefills`."""

    def __init__(
        self, decodes: Sequence[Segment], prefills: Sequence[Segment], frames: FrameBank, bag_cache: BagCache
    ) -> None:
        assert all(segment.tokens == 1 for segment in decodes)
        self._frames = frames
        self._decodes = bag_cache.batch([s.deltas for s in decodes if s.deltas is not None])
        self._prefills = [(s.tokens, s.deltas) for s in prefills if s.deltas is not None]
        self._rows = self._adapted_rows([*decodes, *prefills])
        self._modules = self._decodes.modules
        if self._prefills:
            self._modules = _channels([*self._decodes.adapters, *(deltas for _, deltas in self._prefills)])
        self._input: torch.Tensor | None = None
        self._analysed: dict[FrameKind, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._modules

    def _adapted_rows(self, segments: Sequence[Segment]) -> torch.Tensor | None:
        """Packed tokens that have an adapter; None if all have."""
        if all(s.deltas is not None for s in segments):
            return None
        rows: list[int] = []
        start = 0
        for segment in segments:
            if segment.deltas is not None:
                rows += range(start, start + segment.tokens)
            start += segment.tokens
        return torch.tensor(rows, dtype=torch.int64, device=self._frames.device)

    def add(self, module: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + delta for the tokens whose adapter changes `module`. x: (..., q), y: (..., p), both packed tokens."""
        channels = self._modules.get(module)
        if not channels:
            return y
        flat = y.reshape(-1, y.shape[-1])
        delta = torch.zeros((), device=y.device)
        for channel in channels:
            u = self._sparse_step(module, channel, (y.shape[-1], x.shape[-1]))(self._analyse(x, channel[0]))
            delta = delta + self._frames.get(channel[1], y.shape[-1]).synthesise(u)
        if self._rows is None:
            return (flat.float() + delta).to(y.dtype).view_as(y)
        rows = self._rows
        # Summed in float32: the delta itself is never rounded to bfloat16.
        flat[rows] = (flat.index_select(0, rows).float() + delta).to(y.dtype)
        return flat.view_as(y)

    def _analyse(self, x: torch.Tensor, kind: FrameKind) -> torch.Tensor:
        if self._input is not x:
            self._input = x
            self._analysed = {}
        z = self._analysed.get(kind)
        if z is None:
            flat = x.reshape(-1, x.shape[-1])
            if self._rows is not None:
                flat = flat.index_select(0, self._rows)
            z = self._analysed[kind] = self._frames.get(kind, x.shape[-1]).analyse(flat.float())
        return z

    def _sparse_step(self, module: str, channel: Channel, shape: tuple[int, int]) -> SparseStep:
        key, plans, adapters = (module, channel), self._decodes.plans, self._decodes.adapters
        if key not in plans:
            cores = [_core(deltas, module, channel) for deltas in adapters]
            plans[key] = plan_bags(cores, shape) if any(c is not None for c in cores) else None
        segments = [(tokens, _core(deltas, module, channel)) for tokens, deltas in self._prefills]
        return SparseStep(plans[key], len(adapters), segments, shape)


def _core(deltas: AdapterDeltas, module: str, channel: Channel) -> CsrCore | None:
    delta = deltas.get(module)
    return delta.core if delta is not None and (delta.analysis, delta.synthesis) == channel else None
