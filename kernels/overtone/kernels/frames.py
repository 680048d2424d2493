"""The frames of one device as operators, built on first use and shared by all layers and adapters."""

from __future__ import annotations

from typing import TypeAlias

import torch

from overtone.kernels.dct import DctFrame
from overtone.kernels.native import NativeKernels, TransformPlan
from overtone.kernels.native_frames import NativeFrame
from overtone.kernels.spectral import BlockDftFrame, DftFrame, WaveletFrame
from overtone.kernels.types import Frame, FrameKind

Transform: TypeAlias = DctFrame | DftFrame | NativeFrame | BlockDftFrame | WaveletFrame


class FrameBank:
    """The dispatcher over all kinds of frames, except WEIGHT, whose analysis is the layer's own work.

    native: the CPU kernels that may be used.
    """

    def __init__(self, device: torch.device, native: NativeKernels | None = None) -> None:
        self.device = device
        self.native = native if device.type == "cpu" else None
        self._plans: dict[tuple[FrameKind, int], TransformPlan | None] = {}
        self._transforms: dict[tuple[Frame, int], Transform] = {}

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

    def plan(self, frame: Frame, size: int) -> TransformPlan | None:
        """What native kernels need for the transform of `size` numbers; None if they do not compute it."""
        if self.native is None or frame.kind not in (FrameKind.DCT, FrameKind.DFT):
            return None
        key = frame.kind, size
        if key not in self._plans:
            make = self.native.dct_plan if frame.kind is FrameKind.DCT else self.native.dft_plan
            self._plans[key] = make(size)
        return self._plans[key]

    def _transform(self, frame: Frame, size: int) -> Transform:
        found = self._transforms.get((frame, size))
        if found is None:
            found = self._transforms[frame, size] = self._build(frame, size)
        return found

    def _build(self, frame: Frame, size: int) -> Transform:
        plan = self.plan(frame, size)
        if plan is not None and self.native is not None:
            return NativeFrame(plan, self.native)
        if frame.kind is FrameKind.DCT:
            return DctFrame(size, self.device)
        if frame.kind is FrameKind.DFT:
            return DftFrame(size)
        if frame.kind is FrameKind.BLOCK_DFT:
            return BlockDftFrame(size, frame.block)
        assert frame.taps is not None
        return WaveletFrame(size, frame.taps, self.device)
