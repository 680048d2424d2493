"""One forward pass's view of the adapters: which packed tokens belong to which, and what that adds to a layer.

    y = W x + sum over terms of  g_a * S^T (K_a (A x))        a: the adapter of the token's request

The analysis A x is computed once per distinct input (q, k and v share it, gate and up too), for all adapters together and
only for the tokens of those that use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from overtone.kernels import CsrCore, Frame, FrameBank, FrameKind, apply_core
from overtone.kernels.native import NativeKernels
from overtone.models.channels import AdapterDeltas, Channel, Outline, Outlines, PreparedTerm
from overtone.models.decode_batch import DecodeBatch
from overtone.models.materialised import Materialised, may_be_dense
from overtone.models.row_plan import Piece, RowPlan, widest


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed tokens of one request: its decoded token or a chunk of its prompt. None: the base model.

    ahead: how many tokens of the prompt follow in later steps.
    """

    tokens: int
    deltas: AdapterDeltas | None
    ahead: int = 0


PATHS = ("sparse", "stacked", "shared", "prompt", "materialised")


class AdapterRows:
    """What is kept of the adapters from one forward pass to the next.

    paths: counts rows times modules by how their cores were applied: "sparse" and "stacked" (all adapters of the batch in
    one product), "shared" (one adapter's rows in one product), "prompt" (a chunk of a prompt), "materialised" (a chunk of
    a prompt, by a dense delta).
    """

    def __init__(
        self, device: torch.device, paths: Counter[str] | None = None, native: NativeKernels | None = None
    ) -> None:
        self.outlines = Outlines()
        self.decodes = DecodeBatch(device, native)
        self.materialised = Materialised()
        self.paths: Counter[str] = Counter() if paths is None else paths


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chunk of a prompt. span: its rows of the lane; packed: among all tokens; ahead: see `Segment`."""

    span: slice
    packed: slice
    outline: Outline
    ahead: int


@dataclass(frozen=True, slots=True)
class Lane:
    """The packed tokens whose adapters use one analysis frame: the first `decodes` have an adapter each, then come prompts.

    prompts: in the order of their rows, those with the most tokens to come last; rows: places among all packed tokens, None
    if they are all of them; tokens: how many rows.
    """

    decodes: int
    prompts: Sequence[Prompt]
    rows: torch.Tensor | None
    tokens: int

    def first(self, count: int, device: torch.device) -> torch.Tensor | None:
        """`rows` of the first `count`."""
        if count == self.tokens:
            return self.rows
        return torch.arange(count, device=device) if self.rows is None else self.rows[:count]


class AdapterStep:
    """What one forward pass knows of adapters. `decodes` come first in the packed tokens, then `prefills`."""

    def __init__(
        self, decodes: Sequence[Segment], prefills: Sequence[Segment], frames: FrameBank, kept: AdapterRows
    ) -> None:
        assert all(segment.tokens == 1 for segment in decodes)
        self._frames = frames
        self._paths = kept.paths
        outlines = kept.outlines.of([segment.deltas for segment in (*decodes, *prefills)])
        self._decodes = kept.decodes
        self._decodes.update(outlines[: len(decodes)])
        self._num_decodes = len(decodes)
        self._prompts = list(zip(prefills, outlines[len(decodes) :], strict=True))
        self._materialised = kept.materialised
        self._materialised.begin_step()
        self._modules: Mapping[str, Mapping[Channel, int]] = self._decodes.modules
        if any(one is not None for _, one in self._prompts):
            self._modules = _with_prompts(self._modules, self._prompts)
        self._lanes: dict[Frame, Lane] = {}
        self._rows: dict[tuple[int, ...], torch.Tensor | None] = {}
        self._input: torch.Tensor | None = None
        self._gathered: dict[int, torch.Tensor] = {}
        self._analysed: dict[Frame, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._modules

    def changes(self, module: str) -> bool:
        """Whether `add` would change the output of `module`."""
        return bool(self._modules.get(module))

    def add(self, module: str, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y, to which in place the delta was added for the tokens whose adapter changes `module`.

        x: (..., q), or (...) int64 for one-hot inputs; y: (..., p) the layer's own output, bias: (p,) what of it is not W x.
        """
        channels = self._modules.get(module)
        if not channels:
            return y
        if self._input is not x:
            self._input, self._gathered, self._analysed = x, {}, {}
        flat = y.view(-1, y.shape[-1])
        # The frame of the layer's own weight reads y: it must see it unchanged.
        reads_y = len(channels) > 1 and any(channel.analysis.kind is FrameKind.WEIGHT for channel in channels)
        found = [self._part(module, channel, x, flat, bias, in_place=not reads_y) for channel in channels]
        parts = [part for part in found if part is not None]
        if not parts:
            return y
        rows = parts[0][0]
        if all(other is rows for other, _ in parts):
            delta = parts[0][1]
            for _, other in parts[1:]:
                delta = delta + other
        else:
            rows, delta = self._gather_parts(parts, flat)
        # Summed in float32: the delta itself is never rounded to bfloat16.
        if rows is not None:
            if flat.dtype is torch.float32:
                flat.index_add_(0, rows, delta)
            else:
                flat[rows] = (flat.index_select(0, rows).float() + delta).to(y.dtype)
        elif flat.dtype is torch.float32:
            flat += delta
        else:
            flat.copy_(flat.float() + delta)
        return y

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
        self,
        module: str,
        channel: Channel,
        x: torch.Tensor,
        flat: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_place: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        """What a channel adds: rows and their delta (n, p) float32; None: it was added to `flat` already."""
        lane, size = self._lane(channel.analysis), flat.shape[-1]
        plan = self._decodes.plan(module, channel) if lane.decodes else RowPlan(self._frames.device)
        having = [(one, term) for one in lane.prompts if (term := one.outline.modules.get(module, {}).get(channel))]
        dense = []
        if in_place:
            dense = [(one, delta) for one, term in having if (delta := self._dense(one, term, x, size)) is not None]
        apart = {id(one) for one, _ in dense}
        prompts = [(one.span, term) for one, term in having if id(one) not in apart]
        self._add_dense(dense, x, flat)
        if not prompts and plan.empty:
            return None
        frames = [frame for frame in (plan.analysis, *(term.analysis for _, term in prompts)) if frame is not None]
        wanted = max(plan.coefficients, *(term.core.shape[1] for _, term in prompts), 0)
        z = self._analyse(widest(frames) or channel.analysis, wanted, lane, x, flat, bias)
        used = max([lane.decodes, *(span.stop for span, _ in prompts)])
        rows, z = lane.first(used, flat.device), z[:used]
        u = _assembled(self._pieces(plan, prompts, lane, z), z)
        frames = [frame for frame in (plan.synthesis, *(term.synthesis for _, term in prompts)) if frame is not None]
        synthesis = widest(frames) or channel.synthesis
        gained = plan.gains is not None or any(term.gain is not None for _, term in prompts)
        if in_place and not gained and self._frames.add_synthesis(synthesis, u, flat, rows):
            return None
        delta = self._frames.synthesise(synthesis, u, size)
        if plan.gains is not None:
            delta[: lane.decodes] *= plan.gains
        for span, term in prompts:
            if term.gain is not None:
                delta[span] *= term.gain
        return rows, delta

    def _dense(self, prompt: Prompt, term: PreparedTerm, x: torch.Tensor, size: int) -> torch.Tensor | None:
        """The term's delta_W^T (q, p), if that is the cheaper way for what is left of the prompt."""
        if not x.is_floating_point() or not may_be_dense(term):
            return None
        tokens = prompt.packed.stop - prompt.packed.start + prompt.ahead
        return self._materialised.of(
            term, (size, x.shape[-1]), tokens, partial(self._as_matrix, term, x.shape[-1], size)
        )

    def _as_matrix(self, term: PreparedTerm, inputs: int, size: int) -> torch.Tensor:
        z = self._frames.analyse(term.analysis, torch.eye(inputs, device=self._frames.device), term.core.shape[1])
        delta = self._frames.synthesise(term.synthesis, self._applied(term, z), size)
        return delta if term.gain is None else delta * term.gain

    def _add_dense(self, dense: Sequence[tuple[Prompt, torch.Tensor]], x: torch.Tensor, flat: torch.Tensor) -> None:
        inputs = x.reshape(-1, x.shape[-1])
        for prompt, delta in dense:
            self._paths["materialised"] += prompt.packed.stop - prompt.packed.start
            y = flat[prompt.packed]
            if y.dtype is torch.float32:
                y.addmm_(inputs[prompt.packed].float(), delta)
            else:
                y.copy_(y.float() + inputs[prompt.packed].float() @ delta)

    def _pieces(
        self, plan: RowPlan, prompts: Sequence[tuple[slice, PreparedTerm]], lane: Lane, z: torch.Tensor
    ) -> Iterator[Piece]:
        if lane.decodes:
            self._paths.update(plan.rows_by_path)
            yield from plan.pieces(z[: lane.decodes])
        for span, term in prompts:
            self._paths["prompt"] += span.stop - span.start
            yield span, self._applied(term, z[span])

    def _applied(self, term: PreparedTerm, z: torch.Tensor) -> torch.Tensor:
        native = self._frames.native
        if native is not None and isinstance(term.core, CsrCore):
            return apply_core(term.core, z, native)
        return term.core.apply(z)

    def _lane(self, frame: Frame) -> Lane:
        lane = self._lanes.get(frame)
        if lane is None:
            lane = self._lanes[frame] = self._make_lane(frame)
        return lane

    def _make_lane(self, frame: Frame) -> Lane:
        rows = list(self._decodes.lane(frame).rows)
        decodes, packed = len(rows), self._num_decodes
        prompts = []
        for segment, one in self._prompts:
            if one is not None and frame in one.frames:
                prompts.append((slice(packed, packed + segment.tokens), one, segment.ahead))
            packed += segment.tokens
        # Those that may be materialised, the longest, last: what is left is then a lane's beginning.
        placed = []
        for where, one, ahead in sorted(prompts, key=lambda prompt: prompt[0].stop - prompt[0].start + prompt[2]):
            placed.append(Prompt(slice(len(rows), len(rows) + where.stop - where.start), where, one, ahead))
            rows += range(where.start, where.stop)
        # Lanes of equal rows share one tensor: by its identity gathered inputs are found again.
        key = tuple(rows)
        if key not in self._rows:
            everything = len(rows) == packed and key == tuple(range(packed))
            self._rows[key] = None if everything else torch.tensor(rows, dtype=torch.int64, device=self._frames.device)
        return Lane(decodes, placed, self._rows[key], len(rows))

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


def _with_prompts(
    modules: Mapping[str, Mapping[Channel, int]], prompts: Sequence[tuple[Segment, Outline | None]]
) -> dict[str, dict[Channel, int]]:
    """`modules` with the channels that the prompts' adapters need."""
    merged = {name: dict(channels) for name, channels in modules.items()}
    for one in dict.fromkeys(one for _, one in prompts if one is not None):
        for name, channels in one.modules.items():
            merged.setdefault(name, {}).update(dict.fromkeys(channels, 1))
    return merged


def _assembled(pieces: Iterator[Piece], z: torch.Tensor) -> torch.Tensor:
    """u of all rows of z, zero where no piece says otherwise. Where cores differ in size, the end of the smaller is zero."""
    results = list(pieces)
    if len(results) == 1 and len(results[0][1]) == len(z):
        return results[0][1]
    widest_result = max((result for _, result in results), key=lambda result: result.shape[1])
    u = widest_result.new_zeros(len(z), *widest_result.shape[1:])
    for rows, result in results:
        u[rows, : result.shape[1]] = result
    return u
