"""Which tiles a chip's programs take: what compiles for it without a spilled register (`tests/kernels/test_gpu_kernels.py`).

A table instead of a search at run time: a server must not try out kernels while it serves. Nothing here was timed yet. A
batch's rows decide only how many of them, or of a row's outputs, a program has, never the order of a sum: a row's result is
the same in every batch. The DCT and the DFT have the same configurations.
"""

from __future__ import annotations

from overtone.kernels.gpu.analyse import AnalyseConfig
from overtone.kernels.gpu.plans import split, three_stages
from overtone.kernels.gpu.synthesise import SynthesiseConfig
from overtone.kernels.gpu.tiles import CoreTilesConfig, InverseTilesConfig


def analyse_config(size: int, rows: int, capability: int) -> AnalyseConfig:
    """rows: of the batch, which decide nothing so far; capability: 80, 90, 100 of sm_80, sm_90, sm_100."""
    return AnalyseConfig(warps=8) if three_stages(size) else AnalyseConfig()


def synthesise_config(size: int, rows: int, capability: int) -> SynthesiseConfig:
    if three_stages(size):
        return SynthesiseConfig(block_j=2, warps=8)
    whole = _whole(size)
    if whole <= 32:  # with 4 warps 1536 outputs spill on sm_90
        return SynthesiseConfig(block_c=whole, warps=2)
    # With 4 entries at once 4096 outputs spill on sm_80.
    return SynthesiseConfig(block_c=min(64, whole), block_j=2 if capability < 90 else 4)


def analyse_tiles_config(size: int, capability: int) -> AnalyseConfig:
    if three_stages(size):
        return AnalyseConfig(block_t=2, warps=8)
    return AnalyseConfig(block_t=max(1, min(16, 256 // _whole(size))))


def core_tiles_config(capability: int) -> CoreTilesConfig:
    return CoreTilesConfig()


def inverse_tiles_config(size: int, capability: int) -> InverseTilesConfig:
    if three_stages(size):
        return InverseTilesConfig(block_t=2, warps=8)
    whole = _whole(size)
    return InverseTilesConfig(block_t=4 if whole <= 64 else 2, block_c=min(32, whole))


def _whole(size: int) -> int:
    parts = split(size)
    assert parts is not None
    return parts[0]
