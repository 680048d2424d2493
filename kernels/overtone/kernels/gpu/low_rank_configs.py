"""Which tiles the programs of low-rank pairs, shared projections and merging take, as `overtone.kernels.gpu.configs`.

They do not depend on how many rows there are: the order of a row's sums follows from them, and it must not depend on the
row's neighbours. Nothing here was timed yet.
"""

from __future__ import annotations

from overtone.kernels.gpu.batch import TILE
from overtone.kernels.gpu.expand import ExpandConfig
from overtone.kernels.gpu.low_rank import LowRankConfig
from overtone.kernels.gpu.materialise import MaterialiseConfig


def low_rank_config(most: int, capability: int) -> LowRankConfig:
    """most: no rank is higher; capability: 80, 90, 100 of sm_80, sm_90, sm_100. Few ranks a program in `shrink`, so that
    one row alone keeps many programs busy; with 64 at once tiles spill on sm_90 or sm_100."""
    of_tiles = _ranks(most, TILE, 32)
    return LowRankConfig(expand_r=_ranks(most, 1, 16), tile_shrink_r=of_tiles, tile_expand_r=of_tiles)


def expand_config(most: int, capability: int) -> ExpandConfig:
    """most: the shared projection's outputs."""
    return ExpandConfig(block_r=_ranks(most, 1, 16), tile_r=_ranks(most, TILE, 32))


def materialise_config(capability: int) -> MaterialiseConfig:
    return MaterialiseConfig()


def _ranks(most: int, low: int, high: int) -> int:
    return min(max(1 << (most - 1).bit_length(), low), high)
