"""The kernels of low-rank pairs, shared projections and merging, to be compiled ahead of time, bf16 operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from overtone.kernels.gpu import expand, low_rank, materialise
from overtone.kernels.gpu.batch import TILE
from overtone.kernels.gpu.low_rank_configs import expand_config, low_rank_config, materialise_config

MULTIPLE = " of 16"
"""At the end of a number's kind: it is a multiple of 16, which Triton compiles apart."""
RANKS = (1, 16, 64)
MATERIALISED = ((576, False), (4096, False), (14336, False), (4096, True), (128256, False))
"""Sizes, and whether the frame is the DFT. The last needs 64-bit phases."""
_KINDS = {
    "x_ptr": "*bf16", "h_ptr": "*fp32", "y_ptr": "*bf16", "rows_ptr": "*i64", "directories_ptr": "*i64",
    "words_ptr": "*i32", "numbers_ptr": "*bf16", "slots_ptr": "*i32", "columns_ptr": "*i64", "widths_ptr": "*i32",
    "x_stride": "i32", "h_stride": "i32", "y_stride": "i32", "inputs": "i32", "most": "i32", "layers": "i32",
    "total": "i64",
}  # fmt: skip
_MERGING = {
    "pointers_ptr": "*i32", "cols_ptr": "*i32", "values_ptr": "*fp32", "table_ptr": "*fp32", "r_ptr": "*bf16",
    "rows_ptr": "*i64", "scale_ptr": "*fp32", "addend_ptr": "*bf16", "out_ptr": "*bf16", "m": "i32", "q": "i32",
    "weight": "fp32", "addend_stride": "i32", "out_stride": "i32",
}  # fmt: skip


def low_rank_cases(capability: int) -> Iterator[tuple[Any, ...]]:
    """Name, kernel, kinds of its arguments, constants, warps."""
    pair, up = low_rank_config(capability), expand_config(capability)
    for kernel, warps, r, other, tile in (
        (low_rank._shrink, pair.warps, pair.shrink_r, {"BLOCK_Q": pair.shrink_q}, False),
        (low_rank._expand, pair.warps, pair.expand_r, {"BLOCK_P": pair.expand_p}, False),
        (low_rank._shrink_tiles, pair.warps, pair.tile_shrink_r, {"BLOCK_Q": pair.tile_shrink_q}, True),
        (low_rank._expand_tiles, pair.warps, pair.tile_expand_r, {"BLOCK_P": pair.tile_expand_p}, True),
        (expand._add_expanded, up.warps, up.block_r, {"BLOCK_P": up.block_p}, False),
        (expand._add_expanded_tiles, up.warps, up.tile_r, {"BLOCK_P": up.tile_p}, True),
    ):
        for step in (1, 16):
            for total in ("i32", "i64"):  # up to 8 GiB of arena, and beyond
                constants = {"STEP": step, "BLOCK_R": r, **other, **({"TILE": TILE} if tile else {})}
                name = f"{kernel.__name__} {constants} {total}"
                yield name, kernel, _of_multiples(_KINDS | {"total": total}, step), constants, warps
    yield from _merging_cases(capability)


def _of_multiples(kinds: dict[str, str], step: int) -> dict[str, str]:
    """As layers of such sizes are launched."""
    sizes = ("x_stride", "y_stride", "inputs") if step == 16 else ()
    return {name: kind + MULTIPLE if name in sizes else kind for name, kind in kinds.items()}


def _merging_cases(capability: int) -> Iterator[tuple[Any, ...]]:
    config = materialise_config(capability)
    for size, fourier in MATERIALISED:
        constants: dict[str, Any] = {
            "SIZE": size, "FOURIER": fourier, "WIDE": size > 32000, "BLOCK_J": config.block_j
        }  # fmt: skip
        yield f"between {size} {fourier}", materialise._between, _MERGING, constants, 4
        constants = {
            "SIZE": size, "FOURIER": fourier, "WIDE": size > 32000, "ADDEND": True, "BLOCK_P": config.block_p,
            "BLOCK_Q": config.block_q, "BLOCK_M": config.block_m,
        }  # fmt: skip
        yield f"materialise {size} {fourier}", materialise._materialise, _MERGING, constants, config.warps
