"""The orthonormal DCT-II in any precision, for what is transformed once and then kept: no tables, no native kernels."""

from __future__ import annotations

import math

import torch


def dct(x: torch.Tensor) -> torch.Tensor:
    """z = C_N x along the last axis, C[k, j] = s_k cos(pi (2 j + 1) k / (2 N)), s_0 = sqrt(1/N), s_k = sqrt(2/N).

    x: (..., N) float64 or float32, on any device; returns the same shape and dtype. By a real FFT of the same length after
    the reordering of J. Makhoul, IEEE Trans. ASSP 28 (1980): with v = (x_0, x_2, ..., x_3, x_1) and its spectrum V,
    z[k] = s_k Re(e^{-i pi k / 2N} V[k]) and z[N - k] = -s_k Im(e^{-i pi k / 2N} V[k]).
    """
    size = x.shape[-1]
    if not x.numel():  # MKL's FFT refuses an empty batch
        return x.clone()
    n = torch.arange(size, device=x.device)
    order = torch.where(n < (size + 1) // 2, 2 * n, 2 * (size - 1 - n) + 1)
    k = torch.arange(size // 2 + 1, device=x.device, dtype=torch.float64)
    scale = torch.full_like(k, math.sqrt(2 / size))
    scale[0] = math.sqrt(1 / size)
    phase = torch.polar(scale, -math.pi * k / (2 * size))
    spectrum = torch.fft.rfft(x.index_select(-1, order))
    spectrum = spectrum * phase.to(spectrum.dtype)
    z = torch.empty_like(x)
    z[..., : size // 2 + 1] = spectrum.real
    z[..., size // 2 + 1 :] = -spectrum.imag[..., 1 : (size + 1) // 2].flip(-1)
    return z
