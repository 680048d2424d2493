"""Results for some of the rows, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

from overtone.models.row_plan import Piece

Part: TypeAlias = tuple[torch.Tensor | None, torch.Tensor]
"""Rows, all different, None: 0, 1, ..., and the delta of each, (n, p) float32."""


def add_parts(parts: Sequence[Part], flat: torch.Tensor) -> None:
    """Adds to flat: (T, p), in place, the deltas of all parts."""
    if not parts:
        return
    rows = parts[0][0]
    if all(other is rows for other, _ in parts):
        delta = parts[0][1]
        for _, other in parts[1:]:
            delta = delta + other
    else:
        rows, delta = _gathered(parts, flat)
    # Summed in float32: the delta itself is never rounded to bfloat16.
    if rows is not None:
        if flat.dtype is torch.float32:
            flat.index_add_(0, rows, delta)
        else:
            flat[rows] = (flat.index_select(0, rows).float() + delta).to(flat.dtype)
    elif flat.dtype is torch.float32:
        flat += delta
    else:
        flat.copy_(flat.float() + delta)


def _gathered(parts: Sequence[Part], flat: torch.Tensor) -> Part:
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


def assembled(pieces: Iterator[Piece], z: torch.Tensor) -> torch.Tensor:
    """u of all rows of z, zero where no piece says otherwise. Where cores differ in size, the end of the smaller is zero."""
    results = list(pieces)
    if len(results) == 1 and len(results[0][1]) == len(z):
        return results[0][1]
    widest_result = max((result for _, result in results), key=lambda result: result.shape[1])
    u = widest_result.new_zeros(len(z), *widest_result.shape[1:])
    for rows, result in results:
        u[rows, : result.shape[1]] = result
    return u
