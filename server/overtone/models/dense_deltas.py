"""An adapter's change of one layer as a dense matrix, added to the layer's weight.

    W += sum over terms of  diag(g) S^T K A

in float32, rounded once. A sparse core between cosine or Fourier frames is made by a Triton kernel, where Triton runs; a
low-rank pair is one product; every other term is applied to unit vectors, as to any tokens.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from overtone.kernels import CsrCore, Frame, FrameBank, FrameKind, PreparedLowRank
from overtone.models.channels import PreparedTerm

if TYPE_CHECKING:
    from overtone.kernels.gpu.materialise import Waves

_CHUNK = 1024
"""How many unit vectors a term is applied to at once."""


class DenseDeltas:
    """frames: of the weights' device."""

    def __init__(self, frames: FrameBank) -> None:
        self._frames = frames
        self._waves: dict[tuple[Frame, int], Waves] = {}

    def add_to(self, weight: torch.Tensor, terms: Sequence[PreparedTerm]) -> None:
        """weight: (p, q), changed in place; what the terms need of it is read before."""
        if len(terms) == 1 and terms[0].gain is None and _by_triton(terms[0], weight):
            self._materialise(terms[0], weight, weight.dtype)
            return
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for term in terms:
            self._add_term(term, weight, total)
        weight.copy_(total.add_(weight))

    def _add_term(self, term: PreparedTerm, weight: torch.Tensor, total: torch.Tensor) -> None:
        if _by_triton(term, weight):
            part = total if term.gain is None else torch.zeros_like(total)
            self._materialise(term, part, weight.dtype)
            if term.gain is not None:
                total.addcmul_(part, term.gain[:, None])
        elif _is_pair(term):
            assert isinstance(term.core, PreparedLowRank)
            up = term.core.up if term.gain is None else term.core.up * term.gain
            total.addmm_(up.T, term.core.down)
        else:
            for start in range(0, weight.shape[1], _CHUNK):
                at = slice(start, min(start + _CHUNK, weight.shape[1]))
                z = self._units(term, weight, at)
                delta = self._frames.synthesise(term.synthesis, term.core.apply(z), len(weight))
                total[:, at] += (delta if term.gain is None else delta * term.gain).T

    def _units(self, term: PreparedTerm, weight: torch.Tensor, at: slice) -> torch.Tensor:
        """The analysis of the unit vectors `at`: (n, m)."""
        frame = term.analysis
        if frame.kind is FrameKind.WEIGHT:
            return weight[:, at].T.float()
        if frame.shared is not None:
            return frame.shared.matrix[: term.core.shape[1], at].T
        units = torch.zeros(at.stop - at.start, weight.shape[1], device=weight.device)
        units[:, at].fill_diagonal_(1)
        return self._frames.analyse(frame, units, term.core.shape[1])

    def _materialise(self, term: PreparedTerm, to: torch.Tensor, operand: torch.dtype) -> None:
        """Added to `to`, whatever its dtype. operand: of the products."""
        from overtone.kernels.gpu.low_rank_configs import materialise_config
        from overtone.kernels.gpu.materialise import filled_rows, materialise

        assert isinstance(term.core, CsrCore)
        analysis, synthesis = self._waves_of(term.analysis, to.shape[1]), self._waves_of(term.synthesis, to.shape[0])
        rows = filled_rows(term.core, analysis, synthesis)
        between = torch.empty(len(rows.rows), to.shape[1], dtype=operand, device=to.device)
        config = materialise_config(_capability(to.device))
        materialise(rows, analysis, synthesis, between, to, to, config)

    def _waves_of(self, frame: Frame, size: int) -> Waves:
        from overtone.kernels.gpu.materialise import waves

        if (frame, size) not in self._waves:
            self._waves[frame, size] = waves(frame, size, self._frames.device)
        return self._waves[frame, size]


def _by_triton(term: PreparedTerm, weight: torch.Tensor) -> bool:
    fast = (FrameKind.DCT, FrameKind.DFT)
    return (
        isinstance(term.core, CsrCore)
        and term.analysis.kind in fast
        and term.synthesis.kind in fast
        and weight.stride(1) == 1
        and (weight.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
        and importlib.util.find_spec("triton") is not None
    )


def _is_pair(term: PreparedTerm) -> bool:
    plain = term.analysis.kind is FrameKind.IDENTITY and term.synthesis.kind is FrameKind.IDENTITY
    return plain and isinstance(term.core, PreparedLowRank)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
