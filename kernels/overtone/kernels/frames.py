"""The frames of one device as operators, built on first use and shared by all layers and adapters."""

from __future__ import annotations

import torch

from overtone.kernels.dct import DctFrame
from overtone.kernels.native import NativeKernels
from overtone.kernels.spectral import BlockDftFrame, DftFrame, WaveletFrame
from overtone.kernels.types import Frame, FrameKind


class FrameBank:
    """The dispatcher over all kinds of frames, except WEIGHT, whose analysis is the layer's own work.

    native: the CPU kernels that may be used.
    """

    def __init__(self, device: torch.device, native: NativeKernels | None = None) -> None:
        self.device = device
        self.native = native if device.type == "cpu" else None
        self._transforms: dict[tuple[Frame, int], DctFrame | DftFrame | BlockDftFrame | WaveletFrame] = {}

    def analyse(self, frame: Frame, x: torch.Tensor, coefficients: int) -> torch.Tensor:
        """z = F x. x: (T, N) float32; coefficients: how many rows of a PROJECTION are wanted, else unused.

        Returns (T, m) float32, for BLOCK_DFT (T, N / b, b // 2 + 1) complex64.
        """
        if frame.kind is FrameKind.IDENTITY:
            return x
        if frame.shared is not None:
            return x @ frame.shared.matrix[:coefficients, : x.shape[-1]].T
        return self._transform(frame, x.shape[-1]).analyse(x)

    def synthesise(self, frame: Frame, u: torch.Tensor, size: int) -> torch.Tensor:
        """y = F^T u, for the DFTs the inverse. u: (T, m) as `analyse` returns it; returns (T, size) float32."""
        if frame.kind is FrameKind.IDENTITY:
            return u
        if frame.shared is not None:
            return u @ frame.shared.matrix[: u.shape[-1], :size]
        return self._transform(frame, size).synthesise(u)

    def add_synthesis(self, frame: Frame, u: torch.Tensor, y: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
        """y[rows[i]] += F^T u[i] in one go, if there is a kernel for that; else False, and nothing happened.

        u: (T, m) float32; y: (..., N), rows: (T,) int64, all different, None: 0, 1, ...
        """
        if frame.kind is not FrameKind.DCT or y.dtype is not torch.float32:
            return False
        transform = self._transform(frame, y.shape[-1])
        return isinstance(transform, DctFrame) and transform.add_synthesis(u, y, rows)

    def _transform(self, frame: Frame, size: int) -> DctFrame | DftFrame | BlockDftFrame | WaveletFrame:
        found = self._transforms.get((frame, size))
        if found is None:
            found = self._transforms[frame, size] = self._build(frame, size)
        return found

    def _build(self, frame: Frame, size: int) -> DctFrame | DftFrame | BlockDftFrame | WaveletFrame:
        if frame.kind is FrameKind.DCT:
            return DctFrame(size, self.device, native=self.native)
        if frame.kind is FrameKind.DFT:
            return DftFrame(size)
        if frame.kind is FrameKind.BLOCK_DFT:
            return BlockDftFrame(size, frame.block)
        assert frame.taps is not None
        return WaveletFrame(size, frame.taps, self.device)
