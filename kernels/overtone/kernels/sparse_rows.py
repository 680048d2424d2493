"""The sparse cores of a decoding batch, one a row, as one block-diagonal matrix: u[t] = K_t z[t] in a single product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from overtone.kernels.native import NO_CORE, NativeKernels, sparse_address
from overtone.kernels.sparse import CsrCore

_SPARE_ROWS = 4
_MAX_SLACK = 2
"""Room for how many times the entries there are, before everything is laid out anew."""


class SparseRows:
    """K_0, K_1, ... along the diagonal of a (T p, T q) matrix in compressed rows; `update` rewrites only rows that changed.

    When a sequence leaves a batch and another takes its row, one row's entries are copied, not the batch's. A row has room
    for the entries that it was laid out with; what a smaller core leaves over are zeros at the end of its last row.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self._cores: list[CsrCore | None] = []
        self._starts = [0]
        self._allocate(0, 0)
        self._matrix: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self._cores)

    def update(self, cores: Sequence[CsrCore | None]) -> None:
        """From now on row t has cores[t]; None: u[t] = 0."""
        assert all(core is None or core.shape == self.shape for core in cores)
        held = self._cores
        changed = [t for t, core in enumerate(cores) if t >= len(held) or core is not held[t]]
        self._cores = list(cores)
        try:
            if not self._fits(changed):
                self._lay_out()
                changed = list(range(len(cores)))
            for t in changed:
                self._write(t)
            self._matrix = self._view()
        except BaseException:  # out of memory, say: what is half written must not be taken for a row's core later
            self.__init__(self.shape, self._device)  # type: ignore[misc]
            raise

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q) float32; returns (T, p) float32."""
        (p, q), tokens = self.shape, self.tokens
        assert z.shape == (tokens, q)
        assert z.dtype == torch.float32
        end = self._starts[tokens]
        if not end:
            return z.new_zeros(tokens, p)
        if self._matrix is None:
            return self._by_bags(z, end)
        return torch.mv(self._matrix, z.reshape(-1)).view(tokens, p)

    def _by_bags(self, z: torch.Tensor, end: int) -> torch.Tensor:
        """The same where torch has no sparse product with a vector: without MKL."""
        offsets = self._pointers[: self.tokens * self.shape[0] + 1]
        sums = F.embedding_bag(
            self._cols[:end],
            z.reshape(-1, 1),
            offsets,
            mode="sum",
            per_sample_weights=self._values[:end],
            include_last_offset=True,
        )
        return sums.view(self.tokens, self.shape[0])

    def _fits(self, changed: Sequence[int]) -> bool:
        rows = len(self._starts) - 1
        if len(self._cores) > rows:
            return False
        if any(_entries(self._cores[t]) > self._starts[t + 1] - self._starts[t] for t in changed):
            return False
        return self._starts[len(self._cores)] <= _MAX_SLACK * sum(map(_entries, self._cores)) + len(self._cores)

    def _lay_out(self) -> None:
        entries = [_entries(core) for core in self._cores]
        spare = max(_SPARE_ROWS, len(entries) // 4)
        self._starts = [0]
        for room in entries + [max(entries, default=0)] * spare:
            self._starts.append(self._starts[-1] + room)
        self._allocate(len(entries) + spare, self._starts[-1])

    def _allocate(self, rows: int, entries: int) -> None:
        p, q = self.shape
        assert rows * max(p, q) < 2**31
        assert entries < 2**31
        self._pointers = torch.zeros(rows * p + 1, dtype=torch.int32, device=self._device)
        self._cols = torch.zeros(entries, dtype=torch.int32, device=self._device)
        self._values = torch.zeros(entries, dtype=torch.float32, device=self._device)

    def _write(self, t: int) -> None:
        (p, q), core = self.shape, self._cores[t]
        start, stop = self._starts[t], self._starts[t + 1]
        pointers = self._pointers[t * p : (t + 1) * p]
        used = start + _entries(core)
        if core is None:
            pointers.fill_(start)
        else:
            torch.add(core.pattern.pointers[:-1], start, out=pointers)
            torch.add(core.cols, t * q, out=self._cols[start:used])
            self._values[start:used] = core.values
        self._cols[used:stop] = t * q
        self._values[used:stop] = 0
        self._pointers[(t + 1) * p] = stop

    def _view(self) -> torch.Tensor | None:
        if not torch._C.has_mkl or self._device.type != "cpu":
            return None
        (p, q), tokens = self.shape, self.tokens
        end = self._starts[tokens]
        # The next row's first pointer is where this one's entries end.
        return torch.sparse_csr_tensor(
            self._pointers[: tokens * p + 1],
            self._cols[:end],
            self._values[:end],
            size=(tokens * p, tokens * q),
            check_invariants=False,
        )


def _entries(core: CsrCore | None) -> int:
    return 0 if core is None else core.values.numel()


class SparseTable:
    """`SparseRows` by a native kernel that reads each core where it lies: a change of the batch copies nothing."""

    def __init__(self, shape: tuple[int, int], native: NativeKernels) -> None:
        self.shape = shape
        self._native = native
        self.update([])

    @property
    def tokens(self) -> int:
        return len(self._cores)

    def update(self, cores: Sequence[CsrCore | None]) -> None:
        """From now on row t has cores[t]; None: u[t] = 0."""
        assert all(core is None or core.shape == self.shape for core in cores)
        self._cores = list(cores)  # what the addresses point to is kept
        self._table = torch.tensor([_addresses(core) for core in cores], dtype=torch.int64).view(-1, 4)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q) float32; returns (T, p) float32."""
        assert z.shape == (self.tokens, self.shape[1])
        assert z.dtype == torch.float32
        assert z.stride(1) == 1
        return self._native.sparse_rows(self._table, z, self.shape[0])


def _addresses(core: CsrCore | None) -> tuple[int, int, int, int]:
    return NO_CORE if core is None else sparse_address(core.rows, core.cols, core.values)
