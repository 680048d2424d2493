"""Which tiles the operators of a decoder layer take on a chip: what compiles for it without a spilled register
(`tests/kernels/test_gpu_layers.py`). Nothing here was timed yet.

The split of a token's keys decides the last bits of its result: one number for all chips and batches.
"""

from __future__ import annotations

from overtone.kernels.gpu.attend_decode import DecodeConfig
from overtone.kernels.gpu.attend_prefill import PrefillConfig
from overtone.kernels.gpu.rotate_and_write import RotateConfig
from overtone.kernels.gpu.sample import GreedyConfig

_WIDE = 128
"""Heads above this get smaller tiles."""


def decode_config(capability: int, dim: int) -> DecodeConfig:
    """capability: 80, 90, 100 of sm_80, sm_90, sm_100; dim: of a head."""
    return DecodeConfig(block_n=64 if dim <= _WIDE else 32)


def prefill_config(capability: int, dim: int, itemsize: int = 2) -> PrefillConfig:
    """itemsize: bytes of a number; float32 has no tensor cores here, and larger tiles would spill."""
    if itemsize > 2:
        return PrefillConfig(block_m=32, block_n=32, warps=4)
    return PrefillConfig() if dim <= _WIDE else PrefillConfig(block_m=64, block_n=32, warps=4)


def rotate_config(capability: int) -> RotateConfig:
    return RotateConfig()


def greedy_config(capability: int) -> GreedyConfig:
    return GreedyConfig()
