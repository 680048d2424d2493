"""y[rows[t]] += U^T h[t], U the dense core of the row's adapter, h what a projection shared by all adapters made of x.

h is one ordinary product for the whole batch, before; an adapter owns only U (r, p), in a record `expand` of the arena,
and of h its first r numbers count. One record may serve many layers. One launch for all layers that read h; nothing is
padded: programs beyond a width end at once, as do those of rows without a core. No atomics: each number of y belongs to
one program, and its sum has one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.batch import TILE, Layers, Rows, Tiles, Words
from overtone.kernels.gpu.lookup import up_of


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """block_r: of h's numbers at once; block_p: outputs of a program. For single rows, and for tiles of rows."""

    block_r: int = 16
    block_p: int = 128
    tile_r: int = 16
    tile_p: int = 128
    warps: int = 4


def add_expanded(
    h: torch.Tensor, batch: Rows, words: Words, layers: Layers, y: torch.Tensor, config: ExpandConfig
) -> None:
    """h: (T, m) float32, by row of `batch`; y: (n, ...) the outputs of all layers side by side, T <= n; the last dimension
    of both contiguous."""
    assert h.stride(1) == y.stride(1) == 1
    assert h.dtype is torch.float32
    assert len(h) == len(batch.rows)
    if not h.numel() or not layers.widest:
        return
    _add_expanded[len(h), triton.cdiv(layers.widest, config.block_p), len(layers.slots)](
        h, y, batch.rows, batch.directories, words.words, words.numbers, layers.slots, layers.columns, layers.widths,
        h.stride(0), y.stride(0), h.shape[1], len(words.words), STEP=layers.step, BLOCK_R=config.block_r,
        BLOCK_P=config.block_p, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


def add_expanded_tiles(
    h: torch.Tensor, tiles: Tiles, words: Words, layers: Layers, y: torch.Tensor, config: ExpandConfig
) -> None:
    """`add_expanded` of tiles of rows. h: (n, m) float32, by row of y."""
    assert h.stride(1) == y.stride(1) == 1
    assert h.dtype is torch.float32
    if not h.numel() or not layers.widest or not len(tiles.rows):
        return
    assert tiles.rows.shape[1] == TILE
    _add_expanded_tiles[len(tiles.rows), triton.cdiv(layers.widest, config.tile_p), len(layers.slots)](
        h, y, tiles.rows, tiles.directories, words.words, words.numbers, layers.slots, layers.columns, layers.widths,
        h.stride(0), y.stride(0), h.shape[1], len(words.words), STEP=layers.step, TILE=TILE, BLOCK_R=config.tile_r,
        BLOCK_P=config.tile_p, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def add_up(h_at, up, y_at, rank, width, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """y += U^T h for the program's outputs of one row. h_at, up, y_at: where h, U and the layer's outputs begin."""
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    sums = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        h = tl.load(h_at + r, mask=r < rank, other=0.0)
        real = (r < rank)[:, None] & (p < width)[None, :]
        at = r.to(tl.int64)[:, None] * width + p[None, :]
        sums += tl.load(up + at, mask=real, other=0.0).to(tl.float32) * h[:, None]
    y = tl.load(y_at + p, mask=p < width, other=0.0).to(tl.float32)
    tl.store(y_at + p, (y + tl.sum(sums, 0)).to(y_at.dtype.element_ty), mask=p < width)


@triton.jit
def add_up_tile(h_at, up, y_at, there, rank, width, H_STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """The same for a tile of rows of one adapter. h_at, y_at, there: of each row; H_STEP: from one of h's numbers to the
    next.

    In float32, with the products' operands as TF32 where U is narrower: that has all bits of 16-bit numbers, and h
    neither overflows nor loses as many of its own.
    """
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    precision: tl.constexpr = "ieee" if up.dtype.element_ty == tl.float32 else "tf32"
    sums = tl.zeros((there.shape[0], BLOCK_P), tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        used = there[:, None] & (r < rank)[None, :]
        h = tl.load(h_at[:, None] + r[None, :] * H_STEP, mask=used, other=0.0)
        real = (r < rank)[:, None] & (p < width)[None, :]
        at = r.to(tl.int64)[:, None] * width + p[None, :]
        u = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
        sums = tl.dot(h, u, sums, input_precision=precision)
    to = y_at[:, None] + p[None, :]
    real = there[:, None] & (p < width)[None, :]
    y = tl.load(to, mask=real, other=0.0).to(tl.float32)
    tl.store(to, (y + sums).to(y_at.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["h_stride", "most"])
def _add_expanded(
    h_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    columns_ptr,
    widths_ptr,
    h_stride,
    y_stride,
    most,
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
    rank, up = up_of(words_ptr, numbers_ptr, directory, slot, width, most, total)
    if rank == 0:
        return
    y_at = y_ptr + tl.load(rows_ptr + token) * y_stride + tl.load(columns_ptr + layer) // STEP * STEP
    add_up(h_ptr + token * h_stride, numbers_ptr + up, y_at, rank, width, BLOCK_R, BLOCK_P)


@triton.jit(do_not_specialize=["h_stride", "most"])
def _add_expanded_tiles(
    h_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    numbers_ptr,
    slots_ptr,
    columns_ptr,
    widths_ptr,
    h_stride,
    y_stride,
    most,
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
    rank, up = up_of(words_ptr, numbers_ptr, directory, slot, width, most, total)
    if rank == 0:
        return
    rows = tl.load(rows_ptr + tile * TILE + tl.arange(0, TILE))
    y_at = y_ptr + rows * y_stride + tl.load(columns_ptr + layer) // STEP * STEP
    add_up_tile(h_ptr + rows * h_stride, numbers_ptr + up, y_at, rows >= 0, rank, width, 1, BLOCK_R, BLOCK_P)
