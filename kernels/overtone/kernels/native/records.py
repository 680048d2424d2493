"""What the native CPU kernels are told: tables and addresses."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class TransformPlan:
    """The tables of the orthonormal DCT, or of the orthonormal real DFT, of one even size N.

    coefficients: of the spectrum: N of a DCT, N + 2 of a DFT (see `DftFrame`); factors: of N / 2, none above
    `NativeKernels.largest_radix`, int64; roots: (N, 2), exp(-2 pi i k / N); phases: of a DCT (N, 2), s_k / 2 times cosine
    and sine of pi k / 2 N, s_0 = sqrt(1 / N), else s_k = sqrt(2 / N); of a DFT (1,), sqrt(1 / N).
    """

    size: int
    coefficients: int
    factors: torch.Tensor
    roots: torch.Tensor
    phases: torch.Tensor
    struct: ctypes.Array[ctypes.c_int64] = field(init=False)

    def __post_init__(self) -> None:
        addresses = [t.data_ptr() for t in (self.factors, self.roots, self.phases)]
        numbers = self.size, self.coefficients, len(self.factors)
        object.__setattr__(self, "struct", (ctypes.c_int64 * 6)(*numbers, *addresses))

    @property
    def address(self) -> int:
        """Where the kernels find all of it."""
        return ctypes.addressof(self.struct)

    @staticmethod
    def of_dct(size: int, largest_radix: int) -> TransformPlan | None:
        """None if `size` is odd or has a prime factor above `largest_radix`."""
        k = torch.arange(size, dtype=torch.float64)
        scale = torch.full_like(k, math.sqrt(2 / size))
        scale[0] = math.sqrt(1 / size)
        half = math.pi * k / (2 * size)
        phases = torch.stack((half.cos(), half.sin()), dim=1) * (scale / 2)[:, None]
        return TransformPlan._of(size, size, phases, largest_radix)

    @staticmethod
    def of_dft(size: int, largest_radix: int) -> TransformPlan | None:
        """The same of the DFT."""
        return TransformPlan._of(size, size + 2, torch.tensor([math.sqrt(1 / size)]), largest_radix)

    @staticmethod
    def _of(size: int, coefficients: int, phases: torch.Tensor, largest_radix: int) -> TransformPlan | None:
        if size % 2:
            return None
        factors, rest = [], size // 2
        for factor in (8, 4, 2, *range(3, largest_radix + 1, 2)):
            while rest % factor == 0:
                factors.append(factor)
                rest //= factor
        if rest > 1:
            return None
        turn = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
        roots = torch.stack((turn.cos(), -turn.sin()), dim=1).float()
        return TransformPlan(size, coefficients, torch.tensor(factors, dtype=torch.int64), roots, phases.float())


@dataclass(frozen=True, slots=True)
class SeenRows:
    """m tokens that attend one by one.

    tokens: (m,), which of the packed tokens each is; sequences: (m,), its sequence's row of `table`; first, last: (m,), it
    sees the keys [first, last) of its sequence; table: (sequences, pages), where they are. All int64. parts: of
    `NativeKernels.part_keys` keys each, the most that [first, last) of one of them touches.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    table: torch.Tensor
    parts: int


@dataclass(frozen=True, slots=True)
class OwnedRows:
    """m rows of a batch, each changed by the adapter that it belongs to.

    rows: (m,) int64, which of the batch's rows each is, all different, None: 0, 1, ...; owners: (m,) int64, its adapter,
    -1: none; cores: (adapters, slots, 4) int64, where an adapter's cores lie, by slot (`sparse_address`,
    `low_rank_address`).
    """

    rows: torch.Tensor | None
    owners: torch.Tensor
    cores: torch.Tensor


def sparse_address(rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor) -> tuple[int, int, int, int]:
    """Of K[rows[e], cols[e]] = values[e]; int32, int32, float32, contiguous and kept as long as the address is used."""
    return rows.data_ptr(), cols.data_ptr(), values.data_ptr(), values.numel()


def low_rank_address(down: torch.Tensor, up: torch.Tensor) -> tuple[int, int, int, int]:
    """Of U^T D. down: D (r, q), up: U (r, p), float32, contiguous and kept as long as the address is used."""
    return down.data_ptr(), up.data_ptr(), len(down), 0


NO_CORE = (0, 0, 0, 0)
"""The address of nothing, by either kind."""
