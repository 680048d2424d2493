"""The greedy choice of each row of logits on the device: the lowest index of the largest value.

Two stages, each program writing its own numbers: the largest of each run of BLOCK logits, then of those. NaN counts as +inf,
so it is the maximum; a maximum that is not finite is told beside the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class GreedyConfig:
    """block: logits of a program of the first stage."""

    block: int = 4096
    warps: int = 8


@dataclass(frozen=True, slots=True, eq=False)
class GreedyRoom:
    """What the stages leave each other. largest: (rows, parts) float32; places: (rows, parts) int32."""

    largest: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def of(rows: int, vocabulary: int, config: GreedyConfig, device: torch.device) -> GreedyRoom:
        shape = rows, triton.cdiv(vocabulary, config.block)
        return GreedyRoom(
            torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)
        )


def choose_greedy(
    logits: torch.Tensor, tokens: torch.Tensor, finite: torch.Tensor, room: GreedyRoom, config: GreedyConfig
) -> None:
    """logits: (S, V) of any floating dtype, compared in float32, the last dimension contiguous; tokens: (S,) int64; finite:
    (S,) bool or int8, whether the maximum is; room: of S rows or more."""
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, config.block)
    assert logits.stride(1) == 1
    assert len(tokens) == len(finite) == rows
    assert tokens.dtype is torch.int64
    assert tokens.is_contiguous()
    assert finite.is_contiguous()
    assert len(room.largest) >= rows
    assert room.largest.shape[1] == room.places.shape[1] == parts
    if not rows:
        return
    _largest_of_parts[rows, parts](
        logits, room.largest, room.places, logits.stride(0), vocabulary, parts, BLOCK=config.block,
        num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    _largest_of_rows[(rows,)](
        room.largest, room.places, tokens, finite.view(torch.int8), vocabulary, parts, WIDTH=triton.next_power_of_2(parts),
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _largest_of_parts(logits_ptr, largest_ptr, places_ptr, logits_stride, vocabulary, parts, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = part * BLOCK + tl.arange(0, BLOCK)
    there = j < vocabulary
    x = tl.load(logits_ptr + row * logits_stride + j, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, 0)
    tl.store(largest_ptr + row * parts + part, largest)
    tl.store(places_ptr + row * parts + part, tl.min(tl.where((x == largest) & there, j, vocabulary), 0))


@triton.jit
def _largest_of_rows(largest_ptr, places_ptr, tokens_ptr, finite_ptr, vocabulary, parts, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, WIDTH)
    there = part < parts
    x = tl.load(largest_ptr + row * parts + part, mask=there, other=float("-inf"))
    places = tl.load(places_ptr + row * parts + part, mask=there, other=0)
    largest = tl.max(x, 0)
    # Parts are in the order of their places, so the lowest place of equal ones is the first part's.
    tl.store(tokens_ptr + row, tl.min(tl.where((x == largest) & there, places, vocabulary), 0).to(tl.int64))
    tl.store(finite_ptr + row, (tl.abs(largest) < float("inf")).to(tl.int8))
