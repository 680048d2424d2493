"""sDCTFT's three bands of frequencies (arXiv 2410.09103): by the distance d(u, v) = sqrt(u^2 + v^2) from the constant.

    low: d <= d_max / 3        middle: d_max / 3 < d <= 2 d_max / 3        high: beyond

d_max = sqrt((p - 1)^2 + (q - 1)^2) is the distance of the highest frequency, so that the bands cover the whole plane; the
paper's own d_max can be read in two ways. Its random picks within a band are not made here: the delta is known.
"""

from __future__ import annotations

import torch

BANDS = 3


def shares(n: int) -> tuple[int, ...]:
    """n in even thirds; what is left over goes to the lower bands."""
    return tuple(n // BANDS + (band < n % BANDS) for band in range(BANDS))


def band_masks(start: int, stop: int, shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Which numbers of the rows from `start` to `stop` each band has: BANDS tensors (stop - start, q) bool."""
    p, q = shape
    farthest = (p - 1) ** 2 + (q - 1) ** 2
    distance = torch.arange(start, stop)[:, None] ** 2 + torch.arange(q) ** 2
    low, below_high = 9 * distance <= farthest, 9 * distance <= 4 * farthest
    return low, below_high & ~low, ~below_high
