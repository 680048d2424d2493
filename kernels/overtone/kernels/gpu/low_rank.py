"""y[rows[t]] += U^T (D x[rows[t]]), D and U the low-rank pair of the row's adapter, read where they lie in a pool.

    shrink: h[t] = D x[rows[t]]        expand: y[rows[t]] += U^T h[t]

Two launches for all layers that read x, of whatever widths and ranks: nothing is padded, programs beyond a rank or a
width end at once, as do those of rows without an adapter. No atomics: each number belongs to one program, and its sum
has one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import Layers, Rows


@dataclass(frozen=True, slots=True, eq=False)
class PairPool:
    """numbers: one run; table: (adapters, slots, 3) int64, where D (r, q) and U (r, p) begin, and r, 0: none; most: the
    largest r."""

    numbers: torch.Tensor
    table: torch.Tensor
    most: int


def pairs_of(
    adapters: Sequence[Mapping[int, tuple[torch.Tensor, torch.Tensor]]],
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PairPool:
    """adapters: (D, U) by slot."""
    table, parts, end = torch.zeros(len(adapters), slots, 3, dtype=torch.int64), [], 0
    for adapter, by_slot in enumerate(adapters):
        for slot, (down, up) in by_slot.items():
            assert len(down) == len(up)
            table[adapter, slot] = torch.tensor([end, end + down.numel(), len(down)])
            parts += [down.flatten(), up.flatten()]
            end += down.numel() + up.numel()
    numbers = torch.cat(parts).to(device, dtype) if parts else torch.zeros(0, device=device, dtype=dtype)
    return PairPool(numbers, table.to(device), int(table[..., 2].max()) if table.numel() else 0)


@dataclass(frozen=True, slots=True)
class LowRankConfig:
    """block_r: ranks of a program; block_q: inputs, block_p: outputs at once."""

    block_r: int = 16
    block_q: int = 128
    block_p: int = 128
    warps: int = 4


def add_low_rank(
    x: torch.Tensor, batch: Rows, pool: PairPool, layers: Layers, y: torch.Tensor, config: LowRankConfig
) -> None:
    """x: (n, q); y: (n, ...) the outputs of all layers side by side; the last dimension of both contiguous."""
    assert x.stride(1) == y.stride(1) == 1
    tokens, count = len(batch.rows), len(layers.slots)
    if not tokens or not count or not pool.most:
        return
    h = torch.empty(tokens, count, pool.most, dtype=torch.float32, device=x.device)
    shared = batch.rows, batch.owners, pool.table, pool.numbers, layers.slots
    _shrink[tokens, triton.cdiv(pool.most, config.block_r), count](
        x, h, *shared, x.stride(0), x.shape[1], pool.table.shape[1], pool.most, count,
        BLOCK_R=config.block_r, BLOCK_Q=config.block_q, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    _expand[tokens, triton.cdiv(layers.widest, config.block_p), count](
        h, y, *shared, layers.columns, layers.widths, y.stride(0), pool.table.shape[1], pool.most, count,
        BLOCK_R=config.block_r, BLOCK_P=config.block_p, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _shrink(
    x_ptr,
    h_ptr,
    rows_ptr,
    owners_ptr,
    table_ptr,
    numbers_ptr,
    slots_ptr,
    x_stride,
    inputs,
    slots,
    most,
    layers,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    token, layer = tl.program_id(0), tl.program_id(2)
    owner = tl.load(owners_ptr + token)
    if owner < 0:
        return
    entry = table_ptr + (owner.to(tl.int64) * slots + tl.load(slots_ptr + layer)) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    x_row = x_ptr + tl.load(rows_ptr + token) * x_stride
    down = numbers_ptr + tl.load(entry)
    sums = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for begin in range(0, inputs, BLOCK_Q):
        k = begin + tl.arange(0, BLOCK_Q)
        x = tl.load(x_row + k, mask=k < inputs, other=0.0).to(tl.float32)
        real = (r < rank)[:, None] & (k < inputs)[None, :]
        d = tl.load(down + r[:, None] * inputs + k[None, :], mask=real, other=0.0).to(tl.float32)
        sums += d * x[None, :]
    to = h_ptr + (token.to(tl.int64) * layers + layer) * most + r
    tl.store(to, tl.sum(sums, 1), mask=r < rank)


@triton.jit
def _expand(
    h_ptr,
    y_ptr,
    rows_ptr,
    owners_ptr,
    table_ptr,
    numbers_ptr,
    slots_ptr,
    columns_ptr,
    widths_ptr,
    y_stride,
    slots,
    most,
    layers,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token, layer = tl.program_id(0), tl.program_id(2)
    owner = tl.load(owners_ptr + token)
    if owner < 0:
        return
    entry = table_ptr + (owner.to(tl.int64) * slots + tl.load(slots_ptr + layer)) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    width = tl.load(widths_ptr + layer)
    if rank == 0 or tl.program_id(1) * BLOCK_P >= width:
        return
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    up = numbers_ptr + tl.load(entry + 1)
    h_row = h_ptr + (token.to(tl.int64) * layers + layer) * most
    sums = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        h = tl.load(h_row + r, mask=r < rank, other=0.0)
        real = (r < rank)[:, None] & (p < width)[None, :]
        u = tl.load(up + r[:, None] * width + p[None, :], mask=real, other=0.0).to(tl.float32)
        sums += u * h[:, None]
    y_at = y_ptr + tl.load(rows_ptr + token) * y_stride + tl.load(columns_ptr + layer) + p
    y = tl.load(y_at, mask=p < width, other=0.0).to(tl.float32)
    tl.store(y_at, (y + tl.sum(sums, 0)).to(y_ptr.dtype.element_ty), mask=p < width)
