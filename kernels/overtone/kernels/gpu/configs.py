"""Which tiles a chip's programs take: what compiles for it without a spilled register (`tests/kernels/test_gpu_kernels.py`).

A table instead of a search at run time: a server must not try out kernels while it serves. Nothing here was timed yet.
"""

from __future__ import annotations

from overtone.kernels.gpu.analyse import AnalyseConfig
from overtone.kernels.gpu.plans import BLOCK
from overtone.kernels.gpu.synthesise import SynthesiseConfig


def analyse_config(capability: int) -> AnalyseConfig:
    """capability: 80, 90, 100 of sm_80, sm_90, sm_100."""
    return AnalyseConfig()


def synthesise_config(capability: int) -> SynthesiseConfig:
    """With 16 coefficients at once 1536 outputs spill on sm_90 and sm_100, with 32 4096 do on sm_80."""
    return SynthesiseConfig(block_c=BLOCK if capability < 90 else 2 * BLOCK)
