"""PiCa's projectors: the leading right singular vectors of the base model's weights, from one pinned routine.

    W = U diag(s) Vh,  P = Vh[:r]        W: (p, q) in float32, P: (r, q) float32, orthonormal rows

by `torch.linalg.svd` (LAPACK gesdd) on the CPU, as the authors compute it. Singular vectors are unique up to signs, and up
to rotations where singular values coincide, so what was computed once is kept on disk with its digest and never computed
again for the same base model. The leading rows of a larger P are the smaller P.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from overtone.adapters.base import BaseDescription
from overtone.errors import UnsupportedAdapter
from overtone.kernels import SharedMatrix

BASE_SVD = "base-svd:"
"""Begins the key of a projector's `SharedMatrix`; the module's name follows."""


def rows_digest(rows: torch.Tensor) -> str:
    """SHA-256 of float32 rows as little-endian bytes: 64 hexadecimal digits."""
    return hashlib.sha256(rows.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


class Projectors:
    """Thread-safe. Without a folder there are none, and asking raises `UnsupportedAdapter`."""

    def __init__(self, folder: Path | None = None, base: BaseDescription | None = None) -> None:
        self._folder = folder
        self._base = base

    def get(self, module: str, rank: int) -> SharedMatrix:
        """P of at least `rank` rows for a linear layer of the base, with the key "base-svd:<module>"."""
        raise UnsupportedAdapter("no projectors here", field=module)

    def digest(self, module: str, rank: int) -> str:
        """SHA-256 of P[:rank] as float32 little-endian bytes: 64 hexadecimal digits."""
        raise UnsupportedAdapter("no projectors here", field=module)
