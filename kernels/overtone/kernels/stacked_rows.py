"""Small dense cores of a decoding batch, one a row, as batched products: low-rank pairs, dense matrices, diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from overtone.kernels.prepared import PreparedCore, PreparedDense, PreparedDiagonal, PreparedLowRank

StackableCore: TypeAlias = PreparedLowRank | PreparedDense | PreparedDiagonal

_SPARE_ROWS = 4
_MAX_PADDING = 2


def _parts(core: StackableCore) -> tuple[torch.Tensor, ...]:
    """What is stacked: (q, r) and (r, p); (m_in, m_out); (m,)."""
    if isinstance(core, PreparedLowRank):
        return core.down.T, core.up
    return (core.matrix.T,) if isinstance(core, PreparedDense) else (core.values,)


def stackable(cores: Sequence[PreparedCore | None], limit_bytes: int) -> bool:
    """Whether `StackedRows` takes these cores: all of one kind, not much padding, no more than `limit_bytes`."""
    live = [core for core in cores if core is not None]
    if not live or not all(isinstance(core, StackableCore) and type(core) is type(live[0]) for core in live):
        return False
    parts = [_parts(core) for core in live if isinstance(core, StackableCore)]
    padded = len(cores) * sum(_numel(size) for size in _sizes(parts))
    return 4 * padded <= limit_bytes and padded <= _MAX_PADDING * sum(t.numel() for one in parts for t in one)


def _sizes(parts: Sequence[tuple[torch.Tensor, ...]]) -> list[tuple[int, ...]]:
    """The largest extent of each part along each axis."""
    return [
        tuple(max(extents) for extents in zip(*(part.shape for part in same), strict=True))
        for same in zip(*parts, strict=True)
    ]


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


class StackedRows:
    """u[t] = K_t z[t], smaller cores padded with zeros to the largest; `update` rewrites only rows that changed."""

    def __init__(self) -> None:
        self._cores: list[StackableCore | None] = []
        self._stacks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(4 * stack.numel() for stack in self._stacks)

    def update(self, cores: Sequence[StackableCore | None]) -> None:
        """From now on row t has cores[t]; None: u[t] = 0. At least one is there, all are of one kind."""
        held = self._cores
        changed = [t for t, core in enumerate(cores) if t >= len(held) or core is not held[t]]
        self._cores = list(cores)
        live = [core for core in cores if core is not None]
        sizes = _sizes([_parts(core) for core in live])
        if not self._stacks or len(cores) > len(self._stacks[0]) or sizes != [s.shape[1:] for s in self._stacks]:
            rows = len(cores) + max(_SPARE_ROWS, len(cores) // 4)
            device = _parts(live[0])[0].device
            self._stacks = [torch.zeros(rows, *size, device=device) for size in sizes]
            changed = list(range(len(cores)))
        for t in changed:
            self._write(t)

    def _write(self, t: int) -> None:
        core = self._cores[t]
        parts = (None,) * len(self._stacks) if core is None else _parts(core)
        for stack, part in zip(self._stacks, parts, strict=True):
            if part is None or part.shape != stack.shape[1:]:
                stack[t].zero_()
            if part is not None:
                row = stack[t]
                row[tuple(slice(extent) for extent in part.shape)] = part

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q) float32, for low-rank cores also (T,) int64 for T one-hot vectors; returns (T, p), p the largest."""
        assert len(z) == len(self._cores)
        first, *others = (stack[: len(z)] for stack in self._stacks)
        if first.dim() == 2:
            return z[:, : first.shape[1]] * first
        if z.is_floating_point():
            u = torch.bmm(z[:, None, : first.shape[1]], first)
        else:
            u = first[torch.arange(len(z), device=z.device), z][:, None]
        for stack in others:
            u = torch.bmm(u, stack)
        return u[:, 0]
