"""Frames other than the DCT: the real DFT, the DFT of blocks, the wavelet transform. On any device, through torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from overtone.kernels.types import wavelet_size


class DftFrame:
    """The orthonormal DFT of real signals of one size N, as real numbers; h = N // 2 + 1.

    analyse:    z = [Re X, Im X],  X = rfft(x) / sqrt(N)                     x: (..., N), z: (..., 2 h) float32
    synthesise: y = irfft(u[:h] + i u[h:]) sqrt(N), the inverse of analyse   u: (..., 2 h), y: (..., N) float32
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._half = size // 2 + 1

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.size
        if not x.numel():  # MKL's FFT refuses an empty batch
            return x.new_zeros(*x.shape[:-1], 2 * self._half)
        spectrum = torch.fft.rfft(x, norm="ortho")
        return torch.cat((spectrum.real, spectrum.imag), dim=-1)

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        assert u.shape[-1] == 2 * self._half
        if not u.numel():
            return u.new_zeros(*u.shape[:-1], self.size)
        spectrum = torch.complex(u[..., : self._half].contiguous(), u[..., self._half :].contiguous())
        restored: torch.Tensor = torch.fft.irfft(spectrum, n=self.size, norm="ortho")
        return restored


class BlockDftFrame:
    """rfft of every block of b; h = b // 2 + 1. x, y: (T, N) float32; z, u: (T, N / b, h) complex64."""

    def __init__(self, size: int, block: int) -> None:
        assert size % block == 0
        self.size = size
        self.block = block

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.size
        blocks = x.reshape(*x.shape[:-1], self.size // self.block, self.block)
        if not x.numel():
            return torch.zeros(*blocks.shape[:-1], self.block // 2 + 1, dtype=torch.complex64, device=x.device)
        spectra: torch.Tensor = torch.fft.rfft(blocks)
        return spectra

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        if not u.numel():
            return torch.zeros(u.shape[0], self.size, device=u.device)
        restored: torch.Tensor = torch.fft.irfft(u, n=self.block)
        return restored.flatten(-2)


class WaveletFrame:
    """Transpose of the single-level inverse discrete wavelet transform whose output is cropped to N in the middle.

        synthesise: full[2 k + t] += u[k] low[t] + u[m / 2 + k] high[t];  y = full[L - 2 + c :][:N]
        analyse:    the transpose of that

    with m = `wavelet_size(N, taps)`, L taps a filter, c = (m - L + 2 - N) // 2. x, y: (T, N); z, u: (T, m) float32.
    """

    def __init__(
        self, size: int, taps: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device | None = None
    ) -> None:
        self.size = size
        self._half = wavelet_size(size, taps) // 2
        self._filters = torch.tensor(taps, dtype=torch.float32, device=device)[:, None, :]
        full = 2 * self._half + len(taps[0]) - 2
        self._before = (full - size) // 2
        self._after = full - size - self._before

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.size
        padded = F.pad(x, (self._before, self._after))[:, None, :]
        return F.conv1d(padded, self._filters, stride=2).flatten(-2)

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        assert u.shape[-1] == 2 * self._half
        full = F.conv_transpose1d(u.reshape(-1, 2, self._half), self._filters, stride=2)[:, 0]
        return full[:, self._before : self._before + self.size]
