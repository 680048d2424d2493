"""What the operators should give, in float64, on the device."""

from __future__ import annotations

import math

import torch


def dct(x: torch.Tensor) -> torch.Tensor:
    """C x of each row, C orthonormal DCT-II, by an FFT (`overtone.kernels.dct.DctFrame` has the equations)."""
    size = x.shape[-1]
    spectrum = torch.fft.fft(x.double().index_select(-1, _reorder(size, x.device)))
    return (spectrum * _phase(size, x.device)).real * _weights(size, x.device)


def inverse_dct(u: torch.Tensor) -> torch.Tensor:
    """C^T u of each row: the transpose, step by step."""
    size = u.shape[-1]
    v = torch.fft.fft(u.double() * _weights(size, u.device) * _phase(size, u.device)).real
    y = torch.empty_like(v)
    y[..., _reorder(size, u.device)] = v
    return y


def sparse(rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, z: torch.Tensor, p: int) -> torch.Tensor:
    """K z of each row of z."""
    u = z.new_zeros(len(z), p)
    return u.index_add_(1, rows, z[:, cols] * values)


def _reorder(size: int, device: torch.device) -> torch.Tensor:
    n = torch.arange(size, device=device)
    return torch.where(n < (size + 1) // 2, 2 * n, 2 * (size - 1 - n) + 1)


def _phase(size: int, device: torch.device) -> torch.Tensor:
    angle = -math.pi * torch.arange(size, device=device).double() / (2 * size)
    return torch.polar(torch.ones_like(angle), angle)


def _weights(size: int, device: torch.device) -> torch.Tensor:
    weights = torch.full((size,), math.sqrt(2 / size), dtype=torch.float64, device=device)
    weights[0] = math.sqrt(1 / size)
    return weights
