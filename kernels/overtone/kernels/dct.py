"""The DCT frame on the CPU and, through torch.fft, on any device: orthonormal DCT-II and its inverse along the last axis."""

from __future__ import annotations

import math

import torch

from overtone.kernels.reference import dct_matrix

DENSE_MAX_SIZE = 256
"""Up to this size one dense product beats the FFT's handful of operators (measured on 2 CPU cores)."""


class DctFrame:
    """The transform of one size, with its tables.

        analyse:    z = C x      (orthonormal DCT-II)      x, z: (..., N) float32
        synthesise: y = C^T u    (its inverse, DCT-III)    u, y: (..., N) float32

    Sizes above `DENSE_MAX_SIZE` go through a real FFT of the same length after the reordering of J. Makhoul, "A fast
    cosine transform in one and two dimensions", IEEE Trans. ASSP 28 (1980): v = (x_0, x_2, ..., x_3, x_1),
    C x [k] = s_k Re(e^{-i pi k / 2N} V[k]) and, V being Hermitian, C x [N - k] = -s_{N-k} Im(e^{-i pi k / 2N} V[k]).
    Here v is read backwards, which conjugates V and takes the minus away: the result's numbers are then those of the
    spectrum in another order. Any N >= 1, odd ones included.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | None = None,
        *,
        dense: bool | None = None,
    ) -> None:
        assert size >= 1
        self.size = size
        self.dense = size <= DENSE_MAX_SIZE if dense is None else dense
        if self.dense:
            self._matrix = dct_matrix(size, torch.float32).to(device)
            return
        n = torch.arange(size)
        half = (size + 1) // 2
        reorder = torch.where(n < half, 2 * n, 2 * (size - 1 - n) + 1)[-n % size]
        self._reorder, self._restore = reorder.to(device), torch.argsort(reorder).to(device)
        k = torch.arange(size // 2 + 1)
        # Real and imaginary part of bin k are coefficients k and N - k; bin 0 has no imaginary part.
        parts = torch.stack((k, (size - k) % size), dim=1).flatten()
        places = torch.where(n <= size // 2, 2 * n, 2 * (size - n) + 1)
        self._parts, self._places = parts.to(device), places.to(device)
        scale = torch.full(k.shape, math.sqrt(2 / size), dtype=torch.float64)
        scale[0] = math.sqrt(1 / size)
        phase = torch.polar(scale, math.pi * k.double() / (2 * size))
        self._phase = phase.to(torch.complex64).to(device)
        self._inverse_phase = phase.reciprocal().to(torch.complex64).to(device)

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        assert x.shape[-1] == self.size
        if self.dense:
            return x @ self._matrix.T
        if not x.numel():  # MKL's FFT refuses an empty batch
            return x.clone()
        spectrum = torch.fft.rfft(x.index_select(-1, self._reorder)) * self._phase
        return torch.view_as_real(spectrum).flatten(-2).index_select(-1, self._places)

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        assert u.dtype == torch.float32
        assert u.shape[-1] == self.size
        if self.dense:
            return u @ self._matrix
        if not u.numel():
            return u.clone()
        parts = u.index_select(-1, self._parts)
        parts[..., 1] = 0.0
        spectrum = torch.view_as_complex(parts.unflatten(-1, (-1, 2))) * self._inverse_phase  # type: ignore[no-untyped-call]
        restored: torch.Tensor = torch.fft.irfft(spectrum, n=self.size).index_select(-1, self._restore)
        return restored
