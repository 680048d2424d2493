"""y[rows[t]] += U^T (D x[rows[t]]), D and U the low-rank pair of the row's adapter, read where they lie in the arena.

    shrink: h[t] = D x[rows[t]]        expand: y[rows[t]] += U^T h[t]

Two launches for all layers that read x, of whatever widths and ranks, for single rows and for tiles of rows of one
adapter: nothing is padded, programs beyond a rank or a width end at once, as do those of rows without a pair. No
atomics: each number belongs to one program, and its sum has one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import TILE, Layers, Rows, Tiles, Words
from overtone.kernels.gpu.expand import add_up, add_up_tile
from overtone.kernels.gpu.lookup import pair_of


@dataclass(frozen=True, slots=True)
class LowRankConfig:
    """For single rows, then for tiles of rows: shrink_r: ranks of a program, shrink_q: inputs at once; expand_r: ranks at
    once, expand_p: outputs of a program."""

    shrink_r: int = 4
    shrink_q: int = 512
    expand_r: int = 16
    expand_p: int = 128
    tile_shrink_r: int = 16
    tile_shrink_q: int = 128
    tile_expand_r: int = 16
    tile_expand_p: int = 128
    warps: int = 4


def add_low_rank(
    x: torch.Tensor, batch: Rows, words: Words, layers: Layers, most: int, h: torch.Tensor, y: torch.Tensor,
    config: LowRankConfig,
) -> None:  # fmt: skip
    """x: (n, q); y: (n, ...) the outputs of all layers side by side; the last dimension of both contiguous; most: no pair of
    the arena has a higher rank; h: (T, L, most) float32, what it holds does not matter."""
    tokens, count = len(batch.rows), len(layers.slots)
    _check(x, h, (tokens, count, most), y)
    if not h.numel():
        return
    arena = batch.rows, batch.directories, words.words, words.numbers, layers.slots, layers.widths
    sizes = x.shape[1], most, count, len(words.words)
    _shrink[tokens, triton.cdiv(most, config.shrink_r), count](
        x, h, *arena, x.stride(0), *sizes, STEP=layers.step,
        BLOCK_R=config.shrink_r, BLOCK_Q=config.shrink_q, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    _expand[tokens, triton.cdiv(layers.widest, config.expand_p), count](
        h, y, *arena, layers.columns, y.stride(0), *sizes, STEP=layers.step,
        BLOCK_R=config.expand_r, BLOCK_P=config.expand_p, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


def add_low_rank_tiles(
    x: torch.Tensor, tiles: Tiles, words: Words, layers: Layers, most: int, h: torch.Tensor, y: torch.Tensor,
    config: LowRankConfig,
) -> None:  # fmt: skip
    """`add_low_rank` of tiles of rows. h: (tiles, L, most, TILE) float32, what it holds does not matter."""
    many, count = len(tiles.rows), len(layers.slots)
    _check(x, h, (many, count, most, TILE), y)
    if not h.numel():
        return
    assert tiles.rows.shape[1] == TILE
    arena = tiles.rows, tiles.directories, words.words, words.numbers, layers.slots, layers.widths
    sizes = x.shape[1], most, count, len(words.words)
    _shrink_tiles[many, triton.cdiv(most, config.tile_shrink_r), count](
        x, h, *arena, x.stride(0), *sizes, STEP=layers.step, TILE=TILE,
        BLOCK_R=config.tile_shrink_r, BLOCK_Q=config.tile_shrink_q, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    _expand_tiles[many, triton.cdiv(layers.widest, config.tile_expand_p), count](
        h, y, *arena, layers.columns, y.stride(0), *sizes, STEP=layers.step, TILE=TILE,
        BLOCK_R=config.tile_expand_r, BLOCK_P=config.tile_expand_p, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


def _check(x: torch.Tensor, h: torch.Tensor, shape: tuple[int, ...], y: torch.Tensor) -> None:
    assert x.stride(1) == y.stride(1) == 1
    assert h.shape == shape
    assert h.dtype is torch.float32
    assert h.is_contiguous()


@triton.jit(do_not_specialize=["most", "layers"])
def _shrink(
    x_ptr,
    h_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    widths_ptr,
    x_stride,
    inputs,
    most,
    layers,
    total,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    token, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    directory = tl.load(directories_ptr + token)
    if directory < 0:
        return
    slot, width = tl.load(slots_ptr + layer), tl.load(widths_ptr + layer) // STEP * STEP
    rank, down, _up = pair_of(words_ptr, numbers_ptr, directory, slot, inputs, width, most, total)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    x_row = x_ptr + tl.load(rows_ptr + token) * x_stride
    d_at = numbers_ptr + down + r.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for begin in range(0, inputs, BLOCK_Q):
        k = begin + tl.arange(0, BLOCK_Q)
        x = tl.load(x_row + k, mask=k < inputs, other=0.0).to(tl.float32)
        real = (r < rank)[:, None] & (k < inputs)[None, :]
        sums += tl.load(d_at + k[None, :], mask=real, other=0.0).to(tl.float32) * x[None, :]
    tl.store(h_ptr + (token * layers + layer) * most + r, tl.sum(sums, 1), mask=r < rank)


@triton.jit(do_not_specialize=["most", "layers"])
def _expand(
    h_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    widths_ptr,
    columns_ptr,
    y_stride,
    inputs,
    most,
    layers,
    total,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    width = tl.load(widths_ptr + layer) // STEP * STEP
    directory = tl.load(directories_ptr + token)
    if (directory < 0) | (tl.program_id(1) * BLOCK_P >= width):
        return
    slot = tl.load(slots_ptr + layer)
    rank, _down, up = pair_of(words_ptr, numbers_ptr, directory, slot, inputs, width, most, total)
    if rank == 0:
        return
    h_at = h_ptr + (token * layers + layer) * most
    y_at = y_ptr + tl.load(rows_ptr + token) * y_stride + tl.load(columns_ptr + layer) // STEP * STEP
    add_up(h_at, numbers_ptr + up, y_at, rank, width, BLOCK_R, BLOCK_P)


@triton.jit(do_not_specialize=["most", "layers"])
def _shrink_tiles(
    x_ptr,
    h_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    widths_ptr,
    x_stride,
    inputs,
    most,
    layers,
    total,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    tile, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    directory = tl.load(directories_ptr + tile)
    if directory < 0:
        return
    slot, width = tl.load(slots_ptr + layer), tl.load(widths_ptr + layer) // STEP * STEP
    rank, down, _up = pair_of(words_ptr, numbers_ptr, directory, slot, inputs, width, most, total)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    within = tl.arange(0, TILE)
    rows = tl.load(rows_ptr + tile * TILE + within)
    x_at = x_ptr + rows[None, :] * x_stride
    d_at = numbers_ptr + down + r.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((BLOCK_R, TILE), tl.float32)
    for begin in range(0, inputs, BLOCK_Q):
        k = begin + tl.arange(0, BLOCK_Q)
        read = (rows >= 0)[None, :] & (k < inputs)[:, None]
        x = tl.load(x_at + k[:, None], mask=read, other=0.0).to(numbers_ptr.dtype.element_ty)
        real = (r < rank)[:, None] & (k < inputs)[None, :]
        d = tl.load(d_at + k[None, :], mask=real, other=0.0)
        sums = tl.dot(d, x, sums, input_precision="ieee")
    to = h_ptr + ((tile * layers + layer) * most + r[:, None]) * TILE + within[None, :]
    tl.store(to, sums, mask=(r < rank)[:, None])


@triton.jit(do_not_specialize=["most", "layers"])
def _expand_tiles(
    h_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    widths_ptr,
    columns_ptr,
    y_stride,
    inputs,
    most,
    layers,
    total,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tile, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    width = tl.load(widths_ptr + layer) // STEP * STEP
    directory = tl.load(directories_ptr + tile)
    if (directory < 0) | (tl.program_id(1) * BLOCK_P >= width):
        return
    slot = tl.load(slots_ptr + layer)
    rank, _down, up = pair_of(words_ptr, numbers_ptr, directory, slot, inputs, width, most, total)
    if rank == 0:
        return
    within = tl.arange(0, TILE)
    rows = tl.load(rows_ptr + tile * TILE + within)
    h_at = h_ptr + (tile * layers + layer) * most * TILE + within
    y_at = y_ptr + rows * y_stride + tl.load(columns_ptr + layer) // STEP * STEP
    add_up_tile(h_at, numbers_ptr + up, y_at, rows >= 0, rank, width, TILE, BLOCK_R, BLOCK_P)
