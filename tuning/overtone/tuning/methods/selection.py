"""Which DCT coefficients a layer gets: in three bands, most by energy, the rest at random (sDCTFT, arXiv 2410.09103).

    D = C_p W C_q^T        d(u, v) = sqrt(u^2 + v^2)        bands: d <= d_max / 3 < ... <= 2 d_max / 3 < ...

Of a band's share of n, the part delta are those with the largest |D|, the rest is drawn at random among its others.

d_max is read in two ways: "full" is the distance of the farthest coefficient, sqrt((p - 1)^2 + (q - 1)^2), so that the
bands are thirds of what there is; "half" is an independent implementation's reading of the paper's equation,
sqrt(p^2 + q^2) / 2, with which the high band begins at a third of the diagonal and has most of the plane (that
implementation never chooses beyond d_max; here the band goes on to the corner).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch

from overtone.tuning.methods.transforms import Transforms

BANDS = 3
LIMITS = ("full", "half")

_TOGETHER = 1 << 22
"""Coefficients that are looked at together: rows of the plane, as many as fit."""


class LowRank(NamedTuple):
    """scale b a. a: (r, q), b: (p, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


Matrix: TypeAlias = torch.Tensor | LowRank
"""(p, q), dense or of low rank."""

Block: TypeAlias = tuple[int, torch.Tensor]
"""The number of the first row, and rows (r, q) of a plane."""


def banded_places(
    matrix: Matrix, n: int, *, energy_ratio: float, band_limit: str, generator: torch.Generator, transforms: Transforms
) -> torch.Tensor:
    """n different places in the plane of `matrix` (p, q), n <= p q: (2, n) int64, sorted by row, then column.

    energy_ratio: delta, rounded to whole coefficients in each band. The bands' shares of n are even, a remainder going to
    the lower ones; what a band has no room for goes to the others. Of a dense matrix the spectrum is dense for a moment; of
    one of low rank only rows of it are ever there.
    """
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    spectrum = spectrum_rows(matrix, transforms)
    shares = band_shares(_band_sizes(shape, band_limit), n)
    chosen = torch.empty(0, dtype=torch.int64)
    for band, share in enumerate(shares):
        by_energy = round(energy_ratio * share)

        def strength(first: int, rows: int) -> torch.Tensor:
            return spectrum(first, rows).abs()

        def luck(first: int, rows: int) -> torch.Tensor:
            return torch.rand(rows, shape[1], generator=generator)

        for keys, count in ((strength, by_energy), (luck, share - by_energy)):
            found = _highest(_within(keys, shape, band, band_limit, chosen), count, shape[1])
            chosen = torch.cat((chosen, found))
    flat = chosen.sort().values
    return torch.stack((flat // shape[1], flat % shape[1]))


def spectrum_rows(matrix: Matrix, transforms: Transforms) -> Callable[[int, int], torch.Tensor]:
    """D = C_p W C_q^T by its rows: (first, how many) -> (rows, q) float32."""
    if isinstance(matrix, LowRank):
        a = transforms.analyse(matrix.a.detach().to("cpu", torch.float32))
        b = transforms.analyse(matrix.b.detach().to("cpu", torch.float32).T.contiguous()).T * matrix.scale
        return lambda first, rows: b[first : first + rows] @ a
    along_rows = transforms.analyse(matrix.detach().to("cpu", torch.float32).contiguous())
    dense = transforms.analyse(along_rows.T.contiguous()).T
    return lambda first, rows: dense[first : first + rows]


def band_shares(sizes: Sequence[int], n: int) -> list[int]:
    """How many of n coefficients each band gets. sizes: how many it has, together at least n."""
    assert sum(sizes) >= n
    shares = [min(size, n // BANDS + (band < n % BANDS)) for band, size in enumerate(sizes)]
    for band, size in enumerate(sizes):
        shares[band] += min(size - shares[band], n - sum(shares))
    return shares


def _bands(first: int, rows: int, shape: tuple[int, int], limit: str) -> torch.Tensor:
    """(rows, q) int64: 0, 1 or 2. In whole numbers: 4 d_max^2 is one with either reading."""
    p, q = shape
    limit4 = 4 * ((p - 1) ** 2 + (q - 1) ** 2) if limit == "full" else p * p + q * q
    squares = torch.arange(first, first + rows)[:, None] ** 2 + torch.arange(q) ** 2
    return (36 * squares > limit4).to(torch.int64) + (9 * squares > limit4)


def _band_sizes(shape: tuple[int, int], limit: str) -> list[int]:
    sizes = torch.zeros(BANDS, dtype=torch.int64)
    for first, rows in _row_groups(shape):
        sizes += torch.bincount(_bands(first, rows, shape, limit).flatten(), minlength=BANDS)
    return [int(size) for size in sizes]


def _row_groups(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    size = max(1, _TOGETHER // shape[1])
    return ((first, min(size, shape[0] - first)) for first in range(0, shape[0], size))


def _within(
    keys: Callable[[int, int], torch.Tensor], shape: tuple[int, int], band: int, limit: str, chosen: torch.Tensor
) -> Iterator[Block]:
    """The keys of one band by rows; minus infinity in others and where something is chosen already."""
    for first, rows in _row_groups(shape):
        here = chosen[(chosen >= first * shape[1]) & (chosen < (first + rows) * shape[1])] - first * shape[1]
        free = (_bands(first, rows, shape, limit) == band).flatten()
        free[here] = False
        yield first, keys(first, rows).masked_fill(~free.view(rows, shape[1]), -torch.inf)


def _highest(blocks: Iterator[Block], count: int, columns: int) -> torch.Tensor:
    """Places r q + c of the `count` highest keys, (count,) int64."""
    best, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for first, keys in blocks if count else ():
        start = first * columns
        together = torch.cat((best, keys.flatten()))
        where = torch.cat((places, torch.arange(start, start + keys.numel())))
        best, order = together.topk(min(count, together.numel()))
        places = where[order]
    return places
