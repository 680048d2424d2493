"""The DCTs that training computes with: those of the kernels in float32, and by the definition in float64 for tests."""

from __future__ import annotations

import torch

from overtone.kernels import DCT, FrameBank
from overtone.kernels.reference import dct_matrix


class Transforms:
    """Orthonormal DCT-II and its inverse of any size, on any device; tables are built on first use and shared by layers.

    Without native kernels: their numbers would be another run's on a machine that cannot build them.
    """

    def __init__(self) -> None:
        self._banks: dict[torch.device, FrameBank] = {}
        self._matrices: dict[tuple[int, torch.device], torch.Tensor] = {}

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        """z = C x along the last axis. x: (T, N) float32 or float64; returns the same."""
        if x.dtype == torch.float64:
            return x @ self._matrix(x).T
        return self._bank(x).analyse(DCT, x, x.shape[-1])

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        """y = C^T u along the last axis. u: (T, N) float32 or float64; returns the same."""
        if u.dtype == torch.float64:
            return u @ self._matrix(u)
        return self._bank(u).synthesise(DCT, u, u.shape[-1])

    def _bank(self, x: torch.Tensor) -> FrameBank:
        return self._banks.setdefault(x.device, FrameBank(x.device))

    def _matrix(self, x: torch.Tensor) -> torch.Tensor:
        key = (x.shape[-1], x.device)
        if key not in self._matrices:
            self._matrices[key] = dct_matrix(x.shape[-1]).to(x.device)
        return self._matrices[key]
