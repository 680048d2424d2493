"""One forward pass's view of the adapters: which packed tokens belong to which, and what that adds to a layer.

    y = W x + sum over terms of  g_a * S^T (K_a (A x))        a: the adapter of the token's request

The analysis A x is computed once per distinct input (q, k and v share it, gate and up too), for all adapters together and
only for the tokens of those that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overtone.kernels import CsrCore, Frame, FrameBank, FrameKind, SparseStep
from overtone.models.channels import AdapterDeltas, BatchCache, Channel, Outline, Run, channels_of


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed tokens of one request: its decoded token or a chunk of its prompt. None: the base model."""

    tokens: int
    deltas: AdapterDeltas | None


@dataclass(frozen=True, slots=True)
class Lane:
    """The packed tokens whose adapters use one analysis frame: the first `decodes` have an adapter each, then come prompts.

    rows: their places among all packed tokens, None if they are all of them.
    """

    decodes: int
    prompts: Sequence[tuple[int, Outline]]
    rows: torch.Tensor | None
    tokens: int


class AdapterStep:
    """What one forward pass knows of adapters. `decodes` come first in the packed tokens, then `prefills`."""

    def __init__(
        self, decodes: Sequence[Segment], prefills: Sequence[Segment], frames: FrameBank, bag_cache: BatchCache
    ) -> None:
        assert all(segment.tokens == 1 for segment in decodes)
        self._frames = frames
        segments = [*decodes, *prefills]
        outlines = iter(bag_cache.outlines([s.deltas for s in segments if s.deltas is not None]))
        self._segments = [(s.tokens, next(outlines) if s.deltas is not None else None) for s in segments]
        decoding = [one for _, one in self._segments[: len(decodes)] if one is not None]
        prompts = [one for _, one in self._segments[len(decodes) :] if one is not None]
        self._decodes = bag_cache.batch(decoding, frames.device)
        self._first_prompt = len(decodes)
        self._modules = self._decodes.modules
        if prompts:
            self._modules = channels_of([*decoding, *prompts])
        self._lanes: dict[Frame, Lane] = {}
        self._rows: dict[tuple[int, ...], torch.Tensor | None] = {}
        self._input: torch.Tensor | None = None
        self._gathered: dict[int, torch.Tensor] = {}
        self._analysed: dict[Frame, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._modules

    def add(self, module: str, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y + delta for the tokens whose adapter changes `module`.

        x: (..., q), or (...) int64 for one-hot inputs; y: (..., p) the layer's own output, bias: (p,) what of it is not W x.
        """
        channels = self._modules.get(module)
        if not channels:
            return y
        if self._input is not x:
            self._input, self._gathered, self._analysed = x, {}, {}
        flat = y.reshape(-1, y.shape[-1])
        parts = [self._part(module, channel, x, flat, bias) for channel in channels]
        rows = parts[0][0]
        if all(other is rows for other, _ in parts):
            delta = parts[0][1]
            for _, other in parts[1:]:
                delta = delta + other
        else:
            rows, delta = self._gather_parts(parts, flat)
        # Summed in float32: the delta itself is never rounded to bfloat16.
        if rows is None:
            return (flat.float() + delta).to(y.dtype).view_as(y)
        flat[rows] = (flat.index_select(0, rows).float() + delta).to(y.dtype)
        return flat.view_as(y)

    @staticmethod
    def _gather_parts(
        parts: Sequence[tuple[torch.Tensor | None, torch.Tensor]], flat: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The sum of deltas of different rows, with the rows of all."""
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        for rows, delta in parts:
            if rows is None:
                total += delta
            else:
                total.index_add_(0, rows, delta)
        if any(rows is None for rows, _ in parts):
            return None, total
        union = torch.unique(torch.cat([rows for rows, _ in parts if rows is not None]))
        return union, total.index_select(0, union)

    def _part(
        self, module: str, channel: Channel, x: torch.Tensor, flat: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What a channel adds: rows and their delta (n, p) float32."""
        lane, size = self._lane(channel.analysis), flat.shape[-1]
        if channel.core is CsrCore:
            runs: list[Run] = []
            u = self._sparse(module, channel, lane)(self._analyse(channel.analysis, 0, lane, x, flat, bias))
        else:
            runs = self._runs(module, channel, lane)
            wanted = max(term.core.shape[1] for _, term in runs)
            analysis = _widest([term.analysis for _, term in runs])
            u = _apply_runs(self._analyse(analysis, wanted, lane, x, flat, bias), runs)
        synthesis = _widest([term.synthesis for _, term in runs] or [channel.synthesis])
        delta = self._frames.synthesise(synthesis, u, size)
        for rows, term in runs:
            if term.gain is not None:
                delta[rows] *= term.gain
        return lane.rows, delta

    def _lane(self, frame: Frame) -> Lane:
        lane = self._lanes.get(frame)
        if lane is None:
            lane = self._lanes[frame] = self._make_lane(frame)
        return lane

    def _make_lane(self, frame: Frame) -> Lane:
        used = tuple(i for i, (_, one) in enumerate(self._segments) if one is not None and frame in one.frames)
        prompts = [self._segments[i] for i in used if i >= self._first_prompt]
        decodes = len(used) - len(prompts)
        if used not in self._rows:
            self._rows[used] = self._packed_rows(used)
        tokens = decodes + sum(n for n, _ in prompts)
        return Lane(decodes, [(n, one) for n, one in prompts if one is not None], self._rows[used], tokens)

    def _packed_rows(self, used: tuple[int, ...]) -> torch.Tensor | None:
        """The packed tokens of some segments; None if they are all."""
        if len(used) == len(self._segments):
            return None
        rows: list[int] = []
        start, chosen = 0, set(used)
        for i, (tokens, _) in enumerate(self._segments):
            if i in chosen:
                rows += range(start, start + tokens)
            start += tokens
        return torch.tensor(rows, dtype=torch.int64, device=self._frames.device)

    def _analyse(
        self,
        frame: Frame,
        coefficients: int,
        lane: Lane,
        x: torch.Tensor,
        flat: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if frame.kind is FrameKind.WEIGHT:
            z = (flat if lane.rows is None else flat.index_select(0, lane.rows)).float()
            return z if bias is None else z - bias.float()
        known = self._analysed.get(frame)
        if known is not None and (frame.shared is None or known.shape[1] >= coefficients):
            return known
        z = self._frames.analyse(frame, self._inputs(lane, x), coefficients)
        self._analysed[frame] = z
        return z

    def _inputs(self, lane: Lane, x: torch.Tensor) -> torch.Tensor:
        """The lane's rows of x: (n, q) float32, or (n,) int64."""
        key = id(lane.rows)
        found = self._gathered.get(key)
        if found is None:
            found = x.reshape(-1, x.shape[-1]).float() if x.is_floating_point() else x.reshape(-1)
            if lane.rows is not None:
                found = found.index_select(0, lane.rows)
            self._gathered[key] = found
        return found

    def _sparse(self, module: str, channel: Channel, lane: Lane) -> SparseStep:
        bags = self._decodes.bags(module, channel)
        segments: list[tuple[int, CsrCore | None]] = []
        for tokens, one in lane.prompts:
            term = one.modules.get(module, {}).get(channel)
            segments.append((tokens, term.core if term is not None and isinstance(term.core, CsrCore) else None))
        shape = bags.shape if bags is not None else next(core.shape for _, core in segments if core is not None)
        return SparseStep(bags, lane.decodes, segments, shape)

    def _runs(self, module: str, channel: Channel, lane: Lane) -> list[Run]:
        runs = list(self._decodes.runs(module, channel))
        start = lane.decodes
        for tokens, one in lane.prompts:
            term = one.modules.get(module, {}).get(channel)
            if term is not None:
                runs.append((torch.arange(start, start + tokens, device=self._frames.device), term))
            start += tokens
        return runs


def _widest(frames: Sequence[Frame]) -> Frame:
    """Of equal frames the one that holds the most rows of its matrix: adapters of another rank may hold fewer."""
    return max(frames, key=lambda frame: 0 if frame.shared is None else len(frame.shared.matrix))


def _apply_runs(z: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
    """u[rows] = K z[rows] for every run, zero elsewhere; where cores differ in their outputs, the others' end is zero."""
    (rows, term), *others = runs
    if not others and len(rows) == len(z):
        return term.core.apply(z)
    results = [(rows, term.core.apply(z.index_select(0, rows))) for rows, term in runs]
    widest = max((result for _, result in results), key=lambda result: result.shape[1])
    u = widest.new_zeros(len(z), *widest.shape[1:])
    for rows, result in results:
        u[rows, : result.shape[1]] = result
    return u
