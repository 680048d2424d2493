"""The spectral operators' kernels as `support.aot` compiles them: every configuration shipped for these sizes, bf16
operands, each kernel once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from overtone.kernels.gpu import analyse, configs, synthesise, tiles
from overtone.kernels.gpu.analyse import AnalyseConfig
from overtone.kernels.gpu.batch import TILE
from overtone.kernels.gpu.plans import split, three_stages
from overtone.kernels.gpu.synthesise import SynthesiseConfig
from overtone.kernels.gpu.tiles import InverseTilesConfig

SIZES = (576, 896, 1536, 2048, 3584, 4096, 4864, 8192, 11008, 14336, 18944, 29568)
OF_DFT = 1536
"""The size whose kernels are compiled for the DFT too: they differ in one address."""
ROWS = (1, 64)
Case: TypeAlias = tuple[str, Any, dict[str, str], dict[str, Any], int, frozenset[str]]
"""Name, kernel, types, constants, warps, and which numbers are multiples of 16."""

KINDS = {
    **dict.fromkeys(("x_ptr", "y_ptr", "f_ptr", "m_ptr", "inner_f_ptr", "u_ptr", "z_ptr"), "*bf16"),
    **dict.fromkeys(("rows_ptr", "directories_ptr", "columns_ptr"), "*i64"),
    **dict.fromkeys(("words_ptr", "slots_ptr"), "*i32"),
    **dict.fromkeys(("t_ptr", "inner_t_ptr"), "*fp32"),
    **{"shorts_ptr": "*i16", "octets_ptr": "*u8", "values_ptr": "*fp16"},
    **dict.fromkeys(("tokens", "x_stride", "y_stride", "size", "cut", "padded", "inputs", "blocks", "layers"), "i32"),
}
ROUND = frozenset({"x_stride", "y_stride", "size", "padded", "inputs", "blocks"})


def cases(capability: int) -> Iterator[Case]:
    """Without those that would be compiled twice: most numbers are arguments, not constants."""
    seen = set()
    for case in _all(capability):
        _, kernel, kinds, constants, warps, _ = case
        key = (kernel.__name__, kinds["z_ptr"], tuple(constants.items()), warps)
        if key not in seen:
            seen.add(key)
            yield case


def _all(capability: int) -> Iterator[Case]:
    for size in SIZES:
        for dct in (True, False) if size == OF_DFT else (True,):
            for rows in ROWS:
                yield _analyse(size, configs.analyse_config(size, rows, capability), dct, 1)
                yield _synthesise(size, configs.synthesise_config(size, rows, capability), dct)
            yield _analyse(size, configs.analyse_tiles_config(size, capability), dct, TILE)
            yield _inverse(size, configs.inverse_tiles_config(size, capability), dct)
    core = configs.core_tiles_config(capability)
    yield "core of tiles", tiles._core_tiles, KINDS, {"BLOCK_B": core.block_b}, core.warps, ROUND


def _analyse(size: int, config: AnalyseConfig, dct: bool, together: int) -> Case:
    constants = {
        "N2": _whole(size), "DCT": dct, "THREE": three_stages(size), "TOGETHER": together, "BLOCK_T": config.block_t,
        "BLOCK_K": config.block_k, "BLOCK_N": config.block_n,
    }  # fmt: skip
    name = "analyse" if together == 1 else "analyse tiles"
    return f"{name} {size} {config}", analyse._analyse, KINDS, constants, config.warps, ROUND


def _synthesise(size: int, config: SynthesiseConfig, dct: bool) -> Case:
    whole, three = _whole(size), three_stages(size)
    constants = {
        "M1": whole, "DCT": dct, "THREE": three, "BLOCK_C": whole if three else min(config.block_c, whole),
        "BLOCK_J": config.block_j, "BLOCK_N": config.block_n,
    }  # fmt: skip
    return f"synthesise {size} {config}", synthesise._add_synthesis, KINDS, constants, config.warps, ROUND


def _inverse(size: int, config: InverseTilesConfig, dct: bool) -> Case:
    whole, three = _whole(size), three_stages(size)
    constants = {
        "M1": whole, "DCT": dct, "THREE": three, "TILE": TILE, "BLOCK_T": config.block_t,
        "BLOCK_C": whole if three else min(config.block_c, whole), "BLOCK_N": config.block_n,
    }  # fmt: skip
    return f"inverse of tiles {size} {config}", tiles._add_inverse_tiles, KINDS, constants, config.warps, ROUND


def _whole(size: int) -> int:
    parts = split(size)
    assert parts is not None
    return parts[0]
