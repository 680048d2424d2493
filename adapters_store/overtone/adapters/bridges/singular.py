"""The leading singular vectors of a matrix on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from overtone.errors import UnsupportedAdapter

_WIDE = 1024
"""Up to this smaller side the decomposition is in float64, above in float32, which takes half as long."""
_SMALL = 512
"""Up to this one, more threads than one only wait for each other: on two busy cores they took forty times as long."""
_LARGEST_SIDE, _LARGEST = 4096, 1 << 26
"""The smaller side and the number of entries up to which it is exact. Beyond (a head on a large vocabulary) it is the
randomised one of Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1."""
_OVERSAMPLING, _ITERATIONS = 32, 6


class Singular(NamedTuple):
    """matrix ~ u diag(s) v^T. u: (p, r), s: (r,), largest first, v: (q, r); float64."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(u sqrt(s), sqrt(s) v^T): neither is much larger than the other, which narrow numbers need."""
        root = self.s.sqrt()
        return self.u * root, (self.v * root).T


def leading(matrix: torch.Tensor, rank: int) -> Singular:
    """The best approximation of rank at most `rank`. matrix: (p, q) float64."""
    small = min(matrix.shape)
    if small > _LARGEST_SIDE or matrix.numel() > _LARGEST:
        return randomised(matrix, rank)
    return _exact(matrix if small <= _WIDE else matrix.to(torch.float32), rank)


def numerical_rank(s: torch.Tensor, shape: tuple[int, ...]) -> int:
    """How many singular values are more than rounding makes of zero."""
    return int((s > s.max() * max(shape) * torch.finfo(torch.float64).eps).sum()) if s.numel() else 0


def randomised(matrix: torch.Tensor, rank: int) -> Singular:
    """`leading` by products with a few random vectors, in float32; the same for the same matrix."""
    narrow = matrix.to(torch.float32)
    wanted = min(rank + _OVERSAMPLING, *matrix.shape)
    basis = torch.randn(matrix.shape[1], wanted, generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(narrow.T @ torch.linalg.qr(narrow @ basis).Q).Q
    range_ = torch.linalg.qr(narrow @ basis).Q
    u, s, v = _exact(range_.T @ narrow, rank)
    return Singular(range_.to(torch.float64) @ u, s, v)


def _exact(matrix: torch.Tensor, rank: int) -> Singular:
    try:
        with _threads(1 if min(matrix.shape) <= _SMALL else torch.get_num_threads()):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        shape = tuple(matrix.shape)
        raise UnsupportedAdapter(f"the singular vectors of a matrix {shape} were not found: {error}") from error
    return Singular(*(t.to(torch.float64) for t in (u[:, :rank], s[:rank], vh[:rank].T)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
