"""Which tiles the programs of low-rank pairs, shared projections and merging take, as `overtone.kernels.gpu.configs`.

They do not depend on how many rows there are: the order of a row's sums follows from them, and it must not depend on the
row's neighbours. Nothing here was timed yet.
"""

from __future__ import annotations

from overtone.kernels.gpu.expand import ExpandConfig
from overtone.kernels.gpu.low_rank import LowRankConfig
from overtone.kernels.gpu.materialise import MaterialiseConfig

RANKS = 16
"""That a program takes at once: the least that a product on tensor cores may have."""


def low_rank_config(capability: int) -> LowRankConfig:
    """capability: 80, 90, 100 of sm_80, sm_90, sm_100. Few ranks a program in `shrink`, so that one row alone keeps many
    programs busy; with 64 at once tiles spill on sm_90 or sm_100. They do not depend on the batch's largest rank either."""
    return LowRankConfig(expand_r=RANKS, tile_shrink_r=RANKS, tile_expand_r=RANKS)


def expand_config(capability: int) -> ExpandConfig:
    return ExpandConfig(block_r=RANKS, tile_r=RANKS)


def materialise_config(capability: int) -> MaterialiseConfig:
    return MaterialiseConfig()
