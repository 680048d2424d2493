"""The terms of adapters that native kernels add to all rows of a step at once, reading each core where it lies.

    sparse cores between DCTs or real DFTs:  y[t] += F^-1 K_t (F x[t])       low-rank pairs:  y[t] += U_t^T (D_t x[t])

A call serves all layers of one input, decoded tokens and prompts alike. A row's result depends on that row and its adapter
alone, to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overtone.kernels import IDENTITY, CsrCore, Frame, FrameBank, PreparedLowRank
from overtone.kernels.native import NativeKernels, OwnedRows
from overtone.models.channels import Channel
from overtone.models.core_tables import CoreTable, NativeCores
from overtone.models.lanes import Lane, Prompt


class NativeRows:
    """What one step adds by native kernels.

    paths: counts rows times modules, decoded ones by the kind of their core, prompts' as "prompt".
    """

    def __init__(self, native: NativeKernels, frames: FrameBank, kept: NativeCores, paths: Counter[str]) -> None:
        self._native, self._frames, self._kept, self._paths = native, frames, kept, paths
        kept.begin_step()
        self._users: dict[Channel, Users] = {}
        self._inputs: dict[Frame, torch.Tensor] = {}

    def takes(self, channel: Channel, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether there is a kernel for the terms of a channel. x: what its layer reads; y: (T, p) what it says."""
        if channel.gained or x.dtype is not torch.float32 or y.dtype is not torch.float32:
            return False
        if channel.core is CsrCore:
            frame = channel.analysis
            known = all(self._frames.plan(frame, size) is not None for size in (x.shape[-1], y.shape[-1]))
            return frame == channel.synthesis and known
        return channel.core is PreparedLowRank and channel.analysis == channel.synthesis == IDENTITY

    def add(
        self,
        channel: Channel,
        lane: Lane,
        x: torch.Tensor,
        layers: Sequence[tuple[str, torch.Tensor]],
        without: Sequence[Prompt] = (),
    ) -> None:
        """Adds the channel's terms to `layers`, all of which read x: module and (T, p) y. without: prompts that stay as they
        are."""
        users = self._users.get(channel)
        if users is None:
            users = self._users[channel] = Users.of(self._kept.table(channel, lane.adapters), lane)
        slots = users.table.slots
        targets = [(slots[name], y) for name, y in layers]
        sparse = channel.core is CsrCore
        self._paths["sparse" if sparse else "low_rank"] += sum(users.decodes[slot] for slot, _ in targets)
        self._paths["prompt"] += sum(users.prompts[slot] - sum(one.tokens for one in without) for slot, _ in targets)
        owned = OwnedRows(lane.rows, _without(lane.owners, without), users.table.cores)
        rows = x.reshape(-1, x.shape[-1])
        if sparse:
            self._add_sparse(channel.analysis, x, rows, owned, targets)
        else:
            self._native.add_low_rank(rows, owned, targets)

    def _add_sparse(
        self,
        frame: Frame,
        x: torch.Tensor,
        rows: torch.Tensor,
        owned: OwnedRows,
        targets: Sequence[tuple[int, torch.Tensor]],
    ) -> None:
        plans = [self._frames.plan(frame, size) for size in (rows.shape[1], *(y.shape[-1] for _, y in targets))]
        of_x, *of_y = [plan for plan in plans if plan is not None]
        known = self._inputs.get(frame) is x
        self._inputs[frame] = x
        room = self._kept.room(frame, self._native.room_in_lanes(len(owned.owners), of_x))
        layers = [(plan, slot, y) for plan, (slot, y) in zip(of_y, targets, strict=True)]
        self._native.add_spectral(of_x, rows, room, owned, layers, known=known)


@dataclass(frozen=True, slots=True)
class Users:
    """A lane's adapters, and by slot how many decoded rows and rows of prompts have a core there."""

    table: CoreTable
    decodes: list[int]
    prompts: list[int]

    @staticmethod
    def of(table: CoreTable, lane: Lane) -> Users:
        has = (table.cores[:, :, 0] != 0)[lane.owners]
        return Users(table, has[: lane.decodes].sum(0).tolist(), has[lane.decodes :].sum(0).tolist())


def _without(owners: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    if not prompts:
        return owners
    rest = owners.clone()
    for one in prompts:
        rest[one.span] = -1
    return rest
