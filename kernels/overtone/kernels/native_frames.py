"""The DCT and the real DFT by native CPU kernels."""

from __future__ import annotations

import torch

from overtone.kernels.native import NativeKernels, TransformPlan


class NativeFrame:
    """What `DctFrame` or `DftFrame` is, without a copy in between, each row to the last bit by itself."""

    def __init__(self, plan: TransformPlan, native: NativeKernels) -> None:
        self.size = plan.size
        self._plan, self._native = plan, native

    def analyse(self, x: torch.Tensor) -> torch.Tensor:
        return self._native.analyse(self._plan, _rows(x)).view(*x.shape[:-1], self._plan.coefficients)

    def synthesise(self, u: torch.Tensor) -> torch.Tensor:
        return self._native.synthesise(self._plan, _rows(u)).view(*u.shape[:-1], self.size)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(rows, N), the numbers of a row one after another."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
