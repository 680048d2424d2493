"""The sparse core: u[t] = K_a(t) z[t] for packed tokens t, each with the core of its own adapter."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from overtone.kernels.cores import SparseCore, SparsePattern


@dataclass(frozen=True, eq=False)
class CsrPattern:
    """A `SparsePattern` as compressed rows, on a device.

    rows: (n,) int32, ascending; cols: (n,) int32.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]

    @cached_property
    def pointers(self) -> torch.Tensor:
        """(p + 1,) int32, made when they are first asked for: native kernels need none."""
        pointers = torch.zeros(self.shape[0] + 1, dtype=torch.int32, device=self.rows.device)
        pointers[1:] = torch.bincount(self.rows, minlength=self.shape[0]).cumsum(0)
        return pointers

    @property
    def nbytes(self) -> int:
        """With `pointers`, which may come at any time."""
        return 4 * (2 * self.rows.numel() + self.shape[0] + 1)


PatternCache: TypeAlias = MutableMapping[str, CsrPattern]
"""The patterns of one device that adapters share, by key."""


@dataclass(frozen=True, eq=False)
class CsrCore:
    """A `SparseCore` ready to be applied. values: (n,) float32 on the pattern's device; shared: the pattern belongs to many
    adapters."""

    pattern: CsrPattern
    values: torch.Tensor
    shared: bool

    @cached_property
    def matrix(self) -> torch.Tensor:
        """The same as a torch CSR tensor that shares the values' memory, made when it is first asked for."""
        pattern = self.pattern
        return torch.sparse_csr_tensor(
            pattern.pointers, pattern.cols, self.values, size=pattern.shape, check_invariants=False
        )

    @property
    def rows(self) -> torch.Tensor:
        return self.pattern.rows

    @property
    def cols(self) -> torch.Tensor:
        return self.pattern.cols

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def nbytes(self) -> int:
        """Without a shared pattern, which is not this core's."""
        return self.values.numel() * self.values.element_size() + (0 if self.shared else self.pattern.nbytes)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return apply_segment(z, self)


def pattern_key(pattern: SparsePattern) -> str:
    """Under which a `PatternCache` has it, "" if it is not shared: layers of two shapes may have the same coordinates."""
    return f"{pattern.key} {pattern.shape}" if pattern.key else ""


def compress(core: SparseCore, device: torch.device | None = None, patterns: PatternCache | None = None) -> CsrCore:
    """Compressed rows of `core`, on `device`."""
    key = pattern_key(core.pattern) if patterns is not None else ""
    pattern = patterns.get(key) if key and patterns is not None else None
    if pattern is None:
        pattern = CsrPattern(core.rows.to(device), core.cols.to(device), core.shape)
        if key and patterns is not None:
            patterns[key] = pattern
    return CsrCore(pattern, core.values.to(device), shared=bool(key))


def apply_segment(z: torch.Tensor, core: CsrCore) -> torch.Tensor:
    """u = z K^T for tokens that share one core. z: (T, q) float32; returns (T, p) float32."""
    assert z.shape[1] == core.shape[1]
    assert z.dtype == torch.float32
    return torch.mm(core.matrix, z.T.contiguous()).T
