"""One forward pass's view of the adapters: which packed tokens belong to which, and what that adds to a layer.

    y = W x + sum over terms of  g_a * S^T (K_a (A x))        a: the adapter of the token's request

The analysis A x is computed once per distinct input (q, k and v share it, gate and up too), for all adapters together and
only for the tokens of those that use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from overtone.kernels import CsrCore, Frame, FrameBank, FrameKind
from overtone.models.adapter_rows import AdapterRows, Output
from overtone.models.channels import Channel, PreparedTerm, channels_by_module
from overtone.models.lanes import Lane, Lanes, Prompt, Segment
from overtone.models.materialised import BY_NATIVE_KERNELS, BY_TORCH, TokenCost
from overtone.models.parts import Part, add_parts, assembled
from overtone.models.row_plan import Piece, RowPlan, widest


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
        prompts = list(zip(prefills, outlines[len(decodes) :], strict=True))
        self._lanes = Lanes(self._decodes, len(decodes), prompts, frames.device)
        self._native = kept.native_rows(frames)
        self._materialised = kept.materialised
        self._materialised.begin_step()
        prompted = [one for _, one in prompts if one is not None]
        self._modules = self._decodes.modules
        if prompted:
            self._modules = channels_by_module([*self._decodes.adapters, *prompted])
        self._input: torch.Tensor | None = None
        self._gathered: dict[int, torch.Tensor] = {}
        self._analysed: dict[Frame, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._modules

    def reads_output(self, module: str) -> bool:
        """Whether `add` needs what `module` itself answers, nothing added to it yet."""
        return any(channel.analysis.kind is FrameKind.WEIGHT for channel in self._modules.get(module, ()))

    def add(self, x: torch.Tensor, *outputs: Output) -> None:
        """Adds to layers' outputs the deltas of the tokens whose adapter changes the layer. x: (..., q), what all of them
        read, or (...) int64 for one-hot inputs."""
        if self._input is not x:
            self._input, self._gathered, self._analysed = x, {}, {}
        together: dict[Channel, list[tuple[str, torch.Tensor]]] = {}
        for module, y, bias in outputs:
            channels, flat = self._modules.get(module), y.view(-1, y.shape[-1])
            if not channels:
                continue
            # Beside a term that reads y, nothing else may be added to it before.
            in_place = len(channels) == 1 or not self.reads_output(module)
            others = []
            for channel in channels:
                if in_place and self._native is not None and self._native.takes(channel, x, flat):
                    together.setdefault(channel, []).append((module, flat))
                else:
                    others.append(channel)
            if others:
                self._add_one_by_one(module, others, x, flat, bias, in_place=in_place)
        for channel, layers in together.items():
            self._add_together(channel, layers, x)

    def _add_together(self, channel: Channel, layers: list[tuple[str, torch.Tensor]], x: torch.Tensor) -> None:
        assert self._native is not None
        lane = self._lanes.of(channel.analysis)
        for layer in list(layers):
            dense = self._dense_prompts(lane.prompts, *layer, channel, x, BY_NATIVE_KERNELS)
            if dense:
                layers.remove(layer)
                if lane.decodes or len(dense) < len(lane.prompts):
                    self._native.add(channel, lane, x, [layer], without=dense)
        if layers:
            self._native.add(channel, lane, x, layers)

    def _dense_prompts(
        self,
        prompts: Sequence[Prompt],
        module: str,
        flat: torch.Tensor,
        channel: Channel,
        x: torch.Tensor,
        cost: TokenCost,
    ) -> list[Prompt]:
        """Those of `prompts` that go by a dense delta, which is added to `flat`. cost: of the other way."""
        if channel.core is not CsrCore or not x.is_floating_point():
            return []
        dense, (size, inputs) = [], (flat.shape[-1], x.shape[-1])
        for one in prompts:
            if not self._materialised.may_serve(one.to_come, inputs):
                continue
            term = one.outline.modules.get(module, {}).get(channel)
            if term is None:
                continue
            make = partial(self._as_matrix, term, inputs, size)
            delta = self._materialised.of(term, (size, inputs), one.to_come, cost, make)
            if delta is not None:
                dense.append((one, delta))
        self._add_dense(dense, x, flat)
        return [one for one, _ in dense]

    def _add_one_by_one(
        self,
        module: str,
        channels: Sequence[Channel],
        x: torch.Tensor,
        flat: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_place: bool,
    ) -> None:
        found = [self._part(module, channel, x, flat, bias, in_place=in_place) for channel in channels]
        add_parts([part for part in found if part is not None], flat)

    def _part(
        self,
        module: str,
        channel: Channel,
        x: torch.Tensor,
        flat: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_place: bool,
    ) -> Part | None:
        """What a channel adds: rows and their delta (n, p) float32; None: it was added to `flat` already."""
        lane, size = self._lanes.of(channel.analysis), flat.shape[-1]
        plan = self._decodes.plan(module, channel) if lane.decodes else RowPlan(self._frames.device)
        dense = self._dense_prompts(lane.prompts, module, flat, channel, x, BY_TORCH) if in_place else []
        prompts = [
            (one.span, term)
            for one in lane.prompts
            if one not in dense and (term := one.outline.modules.get(module, {}).get(channel))
        ]
        if not prompts and plan.empty:
            return None
        frames = [frame for frame in (plan.analysis, *(term.analysis for _, term in prompts)) if frame is not None]
        wanted = max(plan.coefficients, *(term.core.shape[1] for _, term in prompts), 0)
        z = self._analyse(widest(frames) or channel.analysis, wanted, lane, x, flat, bias)
        used = max([lane.decodes, *(span.stop for span, _ in prompts)])
        rows, z = lane.first(used, flat.device), z[:used]
        u = assembled(self._pieces(plan, prompts, lane, z), z)
        frames = [frame for frame in (plan.synthesis, *(term.synthesis for _, term in prompts)) if frame is not None]
        synthesis = widest(frames) or channel.synthesis
        delta = self._frames.synthesise(synthesis, u, size)
        if plan.gains is not None:
            delta[: lane.decodes] *= plan.gains
        for span, term in prompts:
            if term.gain is not None:
                delta[span] *= term.gain
        return rows, delta

    def _as_matrix(self, term: PreparedTerm, inputs: int, size: int) -> torch.Tensor:
        z = self._frames.analyse(term.analysis, torch.eye(inputs, device=self._frames.device), term.core.shape[1])
        delta = self._frames.synthesise(term.synthesis, term.core.apply(z), size)
        return delta if term.gain is None else delta * term.gain

    def _add_dense(self, dense: Sequence[tuple[Prompt, torch.Tensor]], x: torch.Tensor, flat: torch.Tensor) -> None:
        inputs = x.reshape(-1, x.shape[-1])
        for prompt, delta in dense:
            self._paths["materialised"] += prompt.tokens
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
            yield span, term.core.apply(z[span])

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
