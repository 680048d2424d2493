"""How the cores of one module and channel are applied to the rows of a decoding batch: the choice, and its execution.

Native kernels apply the sparse cores of all rows in one pass. Without them, a sparse core that serves many rows is one
sparse product for them, and all others of the batch are one block-diagonal product.
Small dense cores are one batched product, unless few adapters serve many rows: then a product each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from overtone.kernels import CsrCore, Frame, PreparedCore, SparseRows, SparseTable, StackedRows, stackable
from overtone.kernels.native import NativeKernels
from overtone.models.channels import PreparedTerm

SHARED_FROM = 8
"""Rows from which a sparse core is applied to its rows by one product of its own (measured on 2 CPU cores: from 4 to 8)."""
_ROWS_PER_PRODUCT = 4
"""Dense cores are stacked when there are more of them than a quarter of the rows: below, a product each is cheaper."""
STACK_BYTES = 256 << 20
"""The most that the stacked cores of all modules may take; beyond it each core is applied by itself."""

Piece = tuple[slice | torch.Tensor, torch.Tensor]
"""Some rows of a lane and what they become."""


class RowPlan:
    """u[t] = K_t z[t] for the rows of a lane. `version` is the lane's for which it was made."""

    def __init__(self, device: torch.device, native: NativeKernels | None = None) -> None:
        self.version = -1
        self._device, self._native = device, native
        self._sparse: SparseRows | SparseTable | None = None
        self._stacked: StackedRows | None = None
        self._together: SparseRows | SparseTable | StackedRows | None = None
        self._alone: list[tuple[torch.Tensor, PreparedCore]] = []
        self.rows_by_path: dict[str, int] = {}
        self.analysis: Frame | None = None
        self.synthesis: Frame | None = None
        self.coefficients = 0
        self.gains: torch.Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether no row has a term."""
        return self._together is None and not self._alone

    @property
    def stacked_bytes(self) -> int:
        return 0 if self._stacked is None else self._stacked.nbytes

    def update(self, terms: Sequence[PreparedTerm | None], stack_bytes: int = STACK_BYTES) -> None:
        """From now on row t has terms[t], all of one channel; None: u[t] = 0. stack_bytes: what stacked cores may take."""
        live = [term for term in terms if term is not None]
        self.analysis, self.synthesis = widest([t.analysis for t in live]), widest([t.synthesis for t in live])
        self.coefficients = max((t.core.shape[1] for t in live), default=0)
        self.gains = _gains(terms)
        owners: dict[int, list[int]] = {}
        for row, term in enumerate(terms):
            if term is not None:
                owners.setdefault(id(term.core), []).append(row)
        cores = [None if term is None else term.core for term in terms]
        self._choose(cores, list(owners.values()), stack_bytes)

    def _choose(self, cores: list[PreparedCore | None], groups: list[list[int]], stack_bytes: int) -> None:
        sparse = any(isinstance(core, CsrCore) for core in cores)
        if sparse and self._native is not None:
            alone = []
        elif sparse:
            alone = [rows for rows in groups if len(rows) >= SHARED_FROM]
        elif len(groups) * _ROWS_PER_PRODUCT > len(cores) > 1 and stackable(cores, stack_bytes):
            alone = []
        else:
            alone = groups
        self._alone = [(torch.tensor(rows, device=self._device), _core(cores[rows[0]])) for rows in alone]
        taken = {row for rows in alone for row in rows}
        rest = [None if row in taken else core for row, core in enumerate(cores)]
        self._together = self._joined(rest) if any(core is not None for core in rest) else None
        if self._together is not self._sparse:
            self._sparse = None  # nothing is kept of adapters that left
        if self._together is not self._stacked:
            self._stacked = None
        together = sum(core is not None for core in rest)
        self.rows_by_path = {"sparse" if sparse else "stacked": together, "shared": len(taken)}

    def _joined(self, cores: list[PreparedCore | None]) -> SparseRows | SparseTable | StackedRows:
        first = next(core for core in cores if core is not None)
        if isinstance(first, CsrCore):
            if self._sparse is None or self._sparse.shape != first.shape:
                native, shape = self._native, first.shape
                self._sparse = SparseRows(shape, self._device) if native is None else SparseTable(shape, native)
            self._sparse.update(cores)  # type: ignore[arg-type]
            return self._sparse
        if self._stacked is None:
            self._stacked = StackedRows()
        self._stacked.update(cores)  # type: ignore[arg-type]
        return self._stacked

    def pieces(self, z: torch.Tensor) -> Iterator[Piece]:
        """(rows, u of those rows) for z, the lane's decoding rows. Later pieces overwrite rows of earlier ones."""
        if self._together is not None:
            yield slice(0, len(z)), self._together.apply(z)
        for rows, core in self._alone:
            everything = len(rows) == len(z)  # groups list their rows in order: then rows are 0, 1, ...
            yield (slice(0, len(z)) if everything else rows), core.apply(z if everything else z.index_select(0, rows))


def _core(core: PreparedCore | None) -> PreparedCore:
    assert core is not None
    return core


def widest(frames: Sequence[Frame]) -> Frame | None:
    """Of equal frames the one that holds the most rows of its matrix: adapters of another rank may hold fewer."""
    return max(frames, key=lambda frame: 0 if frame.shared is None else len(frame.shared.matrix), default=None)


def _gains(terms: Sequence[PreparedTerm | None]) -> torch.Tensor | None:
    """(T, p), ones where a term has none; None if no term has one."""
    gain = next((term.gain for term in terms if term is not None and term.gain is not None), None)
    if gain is None:
        return None
    ones = torch.ones_like(gain)
    return torch.stack([ones if term is None or term.gain is None else term.gain for term in terms])
