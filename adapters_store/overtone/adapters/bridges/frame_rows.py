"""Single rows of the frames, in float64 by their definitions: what a sparse core touches is a small part of each."""

from __future__ import annotations

import math

import torch

from overtone.kernels import Frame, FrameKind, wavelet_size

_CHUNK = 1 << 22
"""How many numbers of a frame are held at a time."""


def rows_of(frame: Frame, places: torch.Tensor, size: int, *, synthesis: bool = False) -> torch.Tensor:
    """F[places] of the analysis, or of the transposed synthesis, which differs for the DFT alone.

    places: (k,) int64; returns (k, size) float64. Not for BLOCK_DFT and WEIGHT.
    """
    if frame.kind is FrameKind.IDENTITY:
        return torch.zeros(places.numel(), size, dtype=torch.float64).scatter_(1, places[:, None], 1.0)
    if frame.kind is FrameKind.DCT:
        return _dct_rows(places, size)
    if frame.kind is FrameKind.DFT:
        return _dft_rows(places, size, synthesis)
    if frame.shared is not None:
        return frame.shared.matrix[places, :size].to(torch.float64)
    assert frame.taps is not None, frame.kind
    return _wavelet_rows(places, size, frame.taps)


def spread(
    frame: Frame, places: torch.Tensor, numbers: torch.Tensor, size: int, *, synthesis: bool = False
) -> torch.Tensor:
    """F[places]^T numbers. places: (k,) int64, distinct; numbers: (k, r) float64; returns (size, r) float64."""
    total = torch.zeros(size, numbers.shape[1], dtype=torch.float64)
    if frame.kind is FrameKind.IDENTITY:
        return total.index_copy_(0, places, numbers)
    step = max(1, _CHUNK // size)
    for chunk, part in zip(torch.split(places, step), torch.split(numbers, step), strict=True):
        total.addmm_(rows_of(frame, chunk, size, synthesis=synthesis).T, part)
    return total


def orthonormal(frame: Frame) -> bool:
    """Whether the rows of the frame are, whatever its size."""
    return frame.kind in (FrameKind.IDENTITY, FrameKind.DCT)


def _dct_rows(places: torch.Tensor, size: int) -> torch.Tensor:
    # The angle's whole turns are taken off in integers, where that is exact.
    angle = places[:, None] * (2 * torch.arange(size) + 1) % (4 * size)
    rows = torch.cos(angle.to(torch.float64) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    rows[places == 0] = math.sqrt(1 / size)
    return rows


def _dft_rows(places: torch.Tensor, size: int, synthesis: bool) -> torch.Tensor:
    half = size // 2 + 1
    frequency, imaginary = places % half, places >= half
    angle = (frequency[:, None] * torch.arange(size) % size).to(torch.float64) * (2 * math.pi / size)
    rows = torch.where(imaginary[:, None], -torch.sin(angle), torch.cos(angle)) / math.sqrt(size)
    if synthesis:
        # In between, a frequency stands for its conjugate as well.
        rows[(frequency != 0) & (2 * frequency != size)] *= 2
    return rows


def _wavelet_rows(places: torch.Tensor, size: int, taps: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    half, length = wavelet_size(size, taps) // 2, len(taps[0])
    filters = torch.tensor(taps, dtype=torch.float64)
    full = torch.zeros(places.numel(), 2 * half + length - 2, dtype=torch.float64)
    columns = 2 * (places % half)[:, None] + torch.arange(length)
    full.scatter_(1, columns, filters[places // half])
    start = (full.shape[1] - size) // 2
    return full[:, start : start + size]
