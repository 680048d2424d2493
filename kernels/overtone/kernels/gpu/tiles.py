"""Spectral terms of prompts: TILE rows of one adapter together, the numbers of a core read once for all of them.

    analyse_tiles        z = C x             for each row
    add_core_tiles       u = K z             for each layer
    add_inverse_tiles    y += C^T u

as `overtone.kernels.gpu.analyse` and `overtone.kernels.gpu.synthesise` compute them, with z and u in memory between. Tiles
without an adapter and slots without a record end at once, and leave z, u and y as they are; y of a tile's rows -1 does not
exist. No atomics: each number belongs to one program, and its sum has one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from overtone.kernels.gpu.analyse import AnalyseConfig, launch
from overtone.kernels.gpu.batch import TILE, Layers, Tiles, Words
from overtone.kernels.gpu.core import end_at, parts_at, record_at
from overtone.kernels.gpu.order import source
from overtone.kernels.gpu.plans import BLOCK, Plan
from overtone.kernels.gpu.synthesise import first_factor, second_factor, tables


@dataclass(frozen=True, slots=True)
class CoreTilesConfig:
    """block_b: blocks of 16 places of a program."""

    block_b: int = BLOCK
    warps: int = 4


@dataclass(frozen=True, slots=True)
class InverseTilesConfig:
    """block_t: rows of a program; the others as `SynthesiseConfig` has them."""

    block_t: int = 4
    block_c: int = BLOCK
    block_n: int = BLOCK
    warps: int = 4


def analyse_tiles(plan: Plan, x: torch.Tensor, tiles: Tiles, z: torch.Tensor, config: AnalyseConfig) -> None:
    """x: (n, N), its last dimension contiguous; z: (tiles, N, TILE) of the operands' dtype, contiguous: a coefficient's
    rows side by side; zeros for rows -1."""
    assert tiles.rows.shape == (len(tiles.directories), TILE)
    assert z.shape == (len(tiles.directories), plan.size, TILE)
    launch(plan, x, tiles.rows, tiles.directories, z, config, together=TILE)


def add_core_tiles(
    plan: Plan, z: torch.Tensor, tiles: Tiles, words: Words, layers: Layers, u: torch.Tensor, config: CoreTilesConfig
) -> None:
    """plan: inverse, of the layers' size; z: (tiles, q, TILE) as `analyse_tiles` leaves it; u: (tiles, L, TILE,
    plan.blocks * BLOCK) of the operands' dtype, contiguous, whatever is in it."""
    assert plan.inverse
    assert z.is_contiguous()
    assert u.is_contiguous()
    assert z.shape[::2] == (len(tiles.directories), TILE)
    assert u.shape == (len(z), len(layers.slots), TILE, plan.blocks * BLOCK)
    if not len(z) or not len(layers.slots):
        return
    _core_tiles[len(z), triton.cdiv(plan.blocks, config.block_b), len(layers.slots)](
        z, u, tiles.directories, words.words, words.shorts, words.octets, words.values, layers.slots, z.shape[1],
        plan.blocks, len(layers.slots), BLOCK_B=config.block_b, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


def add_inverse_tiles(
    plan: Plan, u: torch.Tensor, tiles: Tiles, words: Words, layers: Layers, y: torch.Tensor, config: InverseTilesConfig
) -> None:
    """u: as `add_core_tiles` leaves it; layers: all of the plan's size; y: (n, ...) the outputs of all layers side by
    side, its last dimension contiguous."""
    assert plan.inverse
    assert u.is_contiguous()
    assert u.shape == (len(tiles.directories), len(layers.slots), TILE, plan.blocks * BLOCK)
    assert tiles.rows.shape == (len(u), TILE)
    assert tiles.rows.is_contiguous()
    assert y.stride(1) == 1
    assert plan.padded % config.block_n == TILE % config.block_t == 0
    if not len(u) or not len(layers.slots):
        return
    assert layers.widest == plan.size
    _add_inverse_tiles[len(u) * (TILE // config.block_t), plan.padded // config.block_n, len(layers.slots)](
        u, y, tiles.rows, tiles.directories, words.words, layers.slots, layers.columns, *tables(plan), y.stride(0),
        plan.size, plan.cut, plan.padded, len(layers.slots),
        M1=plan.whole, DCT=plan.frame == "dct", THREE=plan.inner is not None, TILE=TILE, BLOCK_T=config.block_t,
        BLOCK_C=plan.whole if plan.inner is not None else min(config.block_c, plan.whole),
        BLOCK_N=config.block_n, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layers"])
def _core_tiles(
    z_ptr,
    u_ptr,
    directories_ptr,
    words_ptr,
    shorts_ptr,
    octets_ptr,
    values_ptr,
    slots_ptr,
    inputs,
    blocks,
    layers,
    BLOCK_B: tl.constexpr,
):
    tile, layer = tl.program_id(0), tl.program_id(2)
    directory = tl.load(directories_ptr + tile)
    if directory < 0:
        return
    record = record_at(words_ptr, directory, tl.load(slots_ptr + layer))
    if record == directory:
        return
    per_word: tl.constexpr = 32 // values_ptr.dtype.element_ty.primitive_bitwidth
    n, scale, values, cols, ends, high, places = parts_at(words_ptr, record, blocks, per_word)
    block = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    known = tl.minimum(block, blocks - 1)
    begin = end_at(shorts_ptr, ends, high, n, known)
    end = end_at(shorts_ptr, ends, high, n, known + 1)
    at = tl.arange(0, 16)
    z_tile = z_ptr + tile.to(tl.int64) * inputs * 16
    u = tl.zeros((BLOCK_B, 16, 16), tl.float32)  # (block, row, place)
    for j in range(0, tl.max(end - begin, 0)):
        entry = begin + j
        has = entry < end
        col = tl.load(shorts_ptr + cols + entry, mask=has, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(values_ptr + values + entry, mask=has, other=0.0).to(tl.float32) * scale
        local = tl.load(octets_ptr + places + entry, mask=has, other=0).to(tl.int32)
        z_at = z_tile + col[:, None] * 16 + at[None, :]
        z = tl.load(z_at, mask=(has & (col < inputs))[:, None], other=0.0).to(tl.float32)
        u += tl.where(local[:, None, None] == at[None, None, :], (value[:, None] * z)[:, :, None], 0.0)
    u_tile = u_ptr + (tile.to(tl.int64) * layers + layer) * 16 * (blocks * 16)
    to = u_tile + block[:, None, None] * 16 + at[None, :, None] * (blocks * 16) + at[None, None, :]
    tl.store(to, u.to(u_ptr.dtype.element_ty), mask=(block < blocks)[:, None, None])


@triton.jit(do_not_specialize=["cut", "layers"])
def _add_inverse_tiles(
    u_ptr,
    y_ptr,
    rows_ptr,
    directories_ptr,
    words_ptr,
    slots_ptr,
    columns_ptr,
    f_ptr,
    t_ptr,
    m_ptr,
    inner_t_ptr,
    y_stride,
    size,
    cut,
    padded,
    layers,
    M1: tl.constexpr,
    DCT: tl.constexpr,
    THREE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, layer = tl.program_id(0) // (TILE // BLOCK_T), tl.program_id(2)
    directory = tl.load(directories_ptr + tile)
    if directory < 0:
        return
    if record_at(words_ptr, directory, tl.load(slots_ptr + layer)) == directory:
        return
    first = tl.program_id(0) % (TILE // BLOCK_T) * BLOCK_T
    places = M1 * padded
    u_tile = u_ptr + ((tile.to(tl.int64) * layers + layer) * TILE + first) * places
    at = tl.arange(0, BLOCK_C * BLOCK_T)  # of (k1, token)
    n2 = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.zeros((M1, BLOCK_T * BLOCK_N), tl.float32)
    for c in range(0, M1, BLOCK_C):
        b_re = tl.zeros((BLOCK_C * BLOCK_T, BLOCK_N), tl.float32)
        b_im = tl.zeros((BLOCK_C * BLOCK_T, BLOCK_N), tl.float32)
        u_at = u_tile + (at % BLOCK_T * places + (c + at // BLOCK_T) * 16)[:, None] + tl.arange(0, 16)[None, :]
        for d in range(0, padded // 16):
            u = tl.load(u_at + d * (M1 * 16))
            b_re, b_im = second_factor(u, b_re, b_im, m_ptr, d, n2, padded)
        k1 = c + tl.arange(0, BLOCK_C)
        v = first_factor(b_re, b_im, v, f_ptr, t_ptr, inner_t_ptr, k1, n2, padded, M1, THREE, BLOCK_T, BLOCK_C, BLOCK_N)
    column = tl.arange(0, BLOCK_T * BLOCK_N)  # of (token, n2)
    row = tl.load(rows_ptr + tile.to(tl.int64) * TILE + first + column // BLOCK_N)
    of_n2 = tl.program_id(1) * BLOCK_N + column % BLOCK_N
    n = tl.arange(0, M1)[:, None] * cut + of_n2[None, :]
    y_row = y_ptr + tl.where(row >= 0, row, 0).to(tl.int64) * y_stride + tl.load(columns_ptr + layer)
    inside = ((of_n2 < cut) & (row >= 0))[None, :] & (n < size)
    y_at = y_row[None, :] + source(n, size, DCT)
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (y + v).to(y_ptr.dtype.element_ty), mask=inside)
