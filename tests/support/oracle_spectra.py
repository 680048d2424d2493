"""Inverse transforms of whole planes of coefficients, dense and in float64: PyWavelets, NumPy and plain loops."""

from __future__ import annotations

import numpy as np
import pywt
import torch


def inverse_fourier(plane: torch.Tensor) -> torch.Tensor:
    """Re ifft2, which divides by p q."""
    return torch.from_numpy(np.fft.ifft2(plane.numpy()).real.copy())


def inverse_wavelet(plane: torch.Tensor, name: str) -> torch.Tensor:
    """The inverse of one level, of a plane (p, q) in the middle of one that is large enough, cropped in the middle.

    Top left approximations, top right horizontal, bottom left vertical, bottom right diagonal details.
    """
    taps = pywt.Wavelet(name).rec_len
    sizes = [size + taps - 2 + (size + taps) % 2 for size in plane.shape]
    large = np.zeros(sizes)
    offsets = [(m - size) // 2 for m, size in zip(sizes, plane.shape, strict=True)]
    inner = tuple(slice(o, o + size) for o, size in zip(offsets, plane.shape, strict=True))
    large[inner] = plane.numpy()
    (h, w) = (m // 2 for m in sizes)
    bands = large[:h, :w], (large[:h, w:], large[h:, :w], large[h:, w:])
    full = pywt.idwt2(bands, name, mode="zero")
    starts = [(f - size) // 2 for f, size in zip(full.shape, plane.shape, strict=True)]
    cropped = full[tuple(slice(s, s + size) for s, size in zip(starts, plane.shape, strict=True))]
    return torch.from_numpy(cropped.copy())


def circulant(kernel: torch.Tensor) -> torch.Tensor:
    """[m b + i, j b + l] = w[m, j, (l - i) mod b]. kernel: (m, n, b)."""
    m, n, b = kernel.shape
    dense = torch.zeros(m, b, n, b, dtype=torch.float64)
    for i in range(b):
        for j in range(b):
            dense[:, i, :, j] = kernel[:, :, (j - i) % b]
    return dense.reshape(m * b, n * b)
