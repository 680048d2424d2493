"""Frames and deltas: the vocabulary of the kernel layer. Knows no adapter family, no request and no model.

Every delta is a sum of terms

    delta_W = sum over terms of  diag(g) S^T K A      delta_W: (p, q), out x in
    y      += g * S^T (K (A x))                      x: (q,), y: (p,)

with an analysis frame A and a synthesis frame S, which are shared by many adapters, and a core K and a gain g, which one
adapter owns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from overtone.kernels.cores import Core, SharedMatrix


class FrameKind(Enum):
    """A change of basis F: (m, N). Analysis z = F x, synthesis y = F^T u."""

    IDENTITY = "identity"
    """m = N: the layer's own coordinates."""
    DCT = "dct"
    """Orthonormal DCT-II, m = N: C[k, j] = s_k cos(pi (2 j + 1) k / (2 N)), s_0 = sqrt(1/N), s_k = sqrt(2/N)."""
    DFT = "dft"
    """Real form of the orthonormal DFT of a real signal, m = 2 (N // 2 + 1): first the real, then the imaginary parts of
    the frequencies 0 to N // 2. Its synthesis is the inverse, not the transpose: irfft of those parts."""
    BLOCK_DFT = "block_dft"
    """rfft of each of the N / b consecutive blocks of b; z: (N / b, b // 2 + 1) complex. Synthesis: irfft."""
    WAVELET = "wavelet"
    """F^T: single-level inverse discrete wavelet transform with the filters `taps`, its output cropped to N in the middle;
    approximation coefficients first, then details; m = `wavelet_size(N, taps)`."""
    PROJECTION = "projection"
    """The leading rows and columns of a matrix that many adapters share; how many the core and the layer decide."""
    WEIGHT = "weight"
    """The layer's frozen weight itself (analysis only): W x, which the layer has computed anyway."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame but for its size. block: of BLOCK_DFT; taps: (low-pass, high-pass) reconstruction filters of WAVELET;
    shared: the matrix of PROJECTION."""

    kind: FrameKind
    block: int = 0
    taps: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    shared: SharedMatrix | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_hash", hash((self.kind, self.block, self.taps, self.shared))
        )  # asked for at every layer
        assert (self.kind is FrameKind.BLOCK_DFT) == (self.block > 0)
        assert (self.kind is FrameKind.WAVELET) == (self.taps is not None)
        assert (self.kind is FrameKind.PROJECTION) == (self.shared is not None)

    def __hash__(self) -> int:
        return self._hash

    def coefficients(self, size: int) -> int | None:
        """m for a layer of this size; None where the core decides. BLOCK_DFT: m counts the blocks."""
        if self.kind in (FrameKind.IDENTITY, FrameKind.DCT):
            return size
        if self.kind is FrameKind.DFT:
            return 2 * (size // 2 + 1)
        if self.kind is FrameKind.BLOCK_DFT:
            return size // self.block
        if self.taps is not None:
            return wavelet_size(size, self.taps)
        return None


IDENTITY = Frame(FrameKind.IDENTITY)
DCT = Frame(FrameKind.DCT)
DFT = Frame(FrameKind.DFT)
WEIGHT = Frame(FrameKind.WEIGHT)


def block_dft(block: int) -> Frame:
    return Frame(FrameKind.BLOCK_DFT, block=block)


def wavelet(low: tuple[float, ...], high: tuple[float, ...]) -> Frame:
    return Frame(FrameKind.WAVELET, taps=(low, high))


def projection(shared: SharedMatrix) -> Frame:
    return Frame(FrameKind.PROJECTION, shared=shared)


def wavelet_size(size: int, taps: tuple[tuple[float, ...], tuple[float, ...]]) -> int:
    """Coefficients of a layer of `size`: enough that the transform without its borders is as long, rounded up to even."""
    padded = size + len(taps[0]) - 2
    return padded + padded % 2


@dataclass(frozen=True, slots=True)
class Term:
    """One summand: diag(gain) S^T K A. gain: (p,) float32, None for ones."""

    analysis: Frame
    core: Core
    synthesis: Frame
    gain: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to one layer. shape: (p, q)."""

    terms: tuple[Term, ...]
    shape: tuple[int, int]
