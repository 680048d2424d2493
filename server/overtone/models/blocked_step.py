"""One forward pass's view of the adapters in which no row depends on another to its last bit (`overtone.models.blocks`).

What native kernels add they add to all rows at once: no row of theirs depends on others anyway. Other frames are applied to
blocks of all rows that use them; cores one after another, each to blocks of its own rows, in one form for decoded and prompt
tokens. A row with several channels adds them in an order that the channels alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from overtone.kernels import Frame, FrameBank, FrameKind
from overtone.models.adapter_rows import AdapterRows, Output
from overtone.models.blocks import by_blocks
from overtone.models.channels import Channel, Outline, PreparedTerm, channels_by_module
from overtone.models.lanes import Lane, Segment


class BlockedStep:
    """What `AdapterStep` is."""

    def __init__(
        self, decodes: Sequence[Segment], prefills: Sequence[Segment], frames: FrameBank, kept: AdapterRows
    ) -> None:
        self._frames, self._paths = frames, kept.paths
        segments = [*decodes, *prefills]
        self._native = kept.native_rows(frames)
        self._rows: dict[Outline, list[int]] = {}
        start = 0
        outlines = kept.outlines.of([segment.deltas for segment in segments])
        for segment, one in zip(segments, outlines, strict=True):
            if one is not None:
                self._rows.setdefault(one, []).extend(range(start, start + segment.tokens))
            start += segment.tokens
        self._decoded = {one: sum(row < len(decodes) for row in rows) for one, rows in self._rows.items()}
        self._modules = channels_by_module(self._rows)
        self._input: torch.Tensor | None = None
        self._analysed: dict[Frame, tuple[torch.Tensor, dict[Outline, slice]]] = {}
        self._lanes: dict[tuple[Outline, ...], torch.Tensor] = {}
        self._native_lanes: dict[Frame, Lane] = {}

    @property
    def empty(self) -> bool:
        return not self._modules

    def reads_output(self, module: str) -> bool:
        """As `AdapterStep.reads_output`; a neighbour must not decide, so always."""
        return True

    def add(self, x: torch.Tensor, *outputs: Output) -> None:
        """As `AdapterStep.add`."""
        if self._input is not x:
            self._input, self._analysed = x, {}
        native: dict[Channel, list[tuple[str, torch.Tensor]]] = {}
        for module, y, bias in outputs:
            flat, channels = y.view(-1, y.shape[-1]), set(self._modules.get(module, ()))
            taken = {c for c in channels if self._native is not None and self._native.takes(c, x, flat)}
            for channel in taken:
                native.setdefault(channel, []).append((module, flat))
            if rest := channels - taken:
                self._add_by_blocks(x, module, rest, flat, bias)
        for channel in sorted(native, key=_order):  # after what may read y
            assert self._native is not None
            self._native.add(channel, self._native_lane(channel.analysis), x, native[channel])

    def _native_lane(self, frame: Frame) -> Lane:
        lane = self._native_lanes.get(frame)
        if lane is None:
            users = [one for one in self._rows if frame in one.layout.frames]
            placed = sorted((row, place) for place, one in enumerate(users) for row in self._rows[one])
            rows, owners = torch.tensor(placed, dtype=torch.int64).view(-1, 2).unbind(1)
            lane = Lane(
                sum(self._decoded[one] for one in users), (), rows.contiguous(), len(placed), users, owners.contiguous()
            )
            self._native_lanes[frame] = lane
        return lane

    def _add_by_blocks(
        self, x: torch.Tensor, module: str, channels: set[Channel], flat: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        users = tuple(one for one in self._rows if not channels.isdisjoint(one.layout.modules.get(module, ())))
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        for channel in sorted(channels, key=_order):
            having = tuple(one for one in users if channel in one.layout.modules[module])
            for one in having:
                self._paths["shared"] += self._decoded[one]
                self._paths["prompt"] += len(self._rows[one]) - self._decoded[one]
            terms = [one.modules[module][channel] for one in having]
            inputs = self._inputs(channel, having, terms, x, flat, bias)
            delta = self._synthesised(channel, having, terms, inputs, flat.shape[1])
            total.index_add_(0, self._lane(having), delta)
        rows = self._lane(users)
        flat[rows] = (flat.index_select(0, rows).float() + total.index_select(0, rows)).to(flat.dtype)

    def _inputs(
        self,
        channel: Channel,
        having: tuple[Outline, ...],
        terms: Sequence[PreparedTerm],
        x: torch.Tensor,
        flat: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Iterator[torch.Tensor]:
        """A x of the rows of each of `having`."""
        frame = channel.analysis
        if frame.kind is FrameKind.WEIGHT:
            for one in having:
                z = flat.index_select(0, self._lane((one,))).float()
                yield z if bias is None else z - bias.float()
            return
        if frame.shared is not None:  # as many of its rows as the adapter itself uses
            for one, term in zip(having, terms, strict=True):
                own, rank = term.analysis, term.core.shape[1]
                z = _rows_of(x, self._lane((one,)))
                yield by_blocks(lambda part, own=own, rank=rank: self._frames.analyse(own, part, rank), z)
            return
        if frame not in self._analysed:
            users = tuple(one for one in self._rows if frame in one.layout.frames)
            rows = _rows_of(x, self._lane(users))
            z = (
                rows
                if frame.kind is FrameKind.IDENTITY
                else by_blocks(lambda p: self._frames.analyse(frame, p, 0), rows)
            )
            self._analysed[frame] = z, self._places(users)
        z, places = self._analysed[frame]
        for one in having:
            yield z[places[one]].clone()  # where a view begins in memory would depend on the others

    def _synthesised(
        self,
        channel: Channel,
        having: tuple[Outline, ...],
        terms: Sequence[PreparedTerm],
        inputs: Iterator[torch.Tensor],
        size: int,
    ) -> torch.Tensor:
        """S^T (K (A x)) of all rows of `having`: (n, size) float32."""
        cores = [by_blocks(term.core.apply, z) for term, z in zip(terms, inputs, strict=True)]
        if channel.synthesis.shared is not None:
            parts = [self._synthesise(term.synthesis, u, size) for term, u in zip(terms, cores, strict=True)]
            delta = torch.cat(parts)
        else:
            delta = self._synthesise(channel.synthesis, torch.cat(cores), size)
        for one, place in self._places(having).items():
            if (gain := terms[having.index(one)].gain) is not None:
                delta[place] *= gain
        return delta

    def _synthesise(self, frame: Frame, u: torch.Tensor, size: int) -> torch.Tensor:
        if frame.kind is FrameKind.IDENTITY:
            return u
        return by_blocks(lambda part: self._frames.synthesise(frame, part, size), u)

    def _lane(self, users: tuple[Outline, ...]) -> torch.Tensor:
        """The packed rows of `users`, one after another."""
        found = self._lanes.get(users)
        if found is None:
            rows = [row for one in users for row in self._rows[one]]
            found = self._lanes[users] = torch.tensor(rows, dtype=torch.int64, device=self._frames.device)
        return found

    def _places(self, users: tuple[Outline, ...]) -> dict[Outline, slice]:
        """Where each one's rows are in the lane of `users`."""
        places, start = {}, 0
        for one in users:
            stop = start + len(self._rows[one])
            places[one] = slice(start, stop)
            start = stop
        return places


def _rows_of(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, q) float32, or (n,) int64."""
    flat = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
    found = flat.index_select(0, rows)
    return found.float() if found.is_floating_point() else found


def _order(channel: Channel) -> tuple[object, ...]:
    return (
        *_frame_order(channel.analysis),
        channel.core.__name__,
        *_frame_order(channel.synthesis),
        channel.gained,
        channel.layer,
    )


def _frame_order(frame: Frame) -> tuple[object, ...]:
    return frame.kind.value, frame.block, frame.taps or (), "" if frame.shared is None else frame.shared.key
