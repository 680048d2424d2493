"""PiCa's projectors: the leading right singular vectors of the base model's weights, from one pinned routine.

    W = U diag(s) Vh,  P = Vh[:r]        W: (p, q) in float32, P: (r, q) float32, orthonormal rows

by `torch.linalg.svd` (LAPACK gesdd) on the CPU, as the authors compute it. Singular vectors are unique up to signs, and up
to rotations where singular values coincide, so what was computed once is kept on disk with its digest and never computed
again for the same base model, unless more rows are asked for than were kept. The leading rows of a larger P are the smaller
P; that they are to the last bit is checked, because they are not on another CPU or with another number of threads.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.projector_file import ProjectorFile, StoredRows, rows_digest
from overtone.errors import BaseModelMismatch, InvalidAdapter, StoreCorrupted, UnsupportedAdapter
from overtone.kernels import SharedMatrix

__all__ = ["BASE_SVD", "Projectors", "right_singular_vectors", "rows_digest"]

BASE_SVD = "base-svd:"
"""Begins the key of a projector's `SharedMatrix`; the module's name follows."""

_STEP = 64
"""Rows are in memory in multiples of this, so that not every rank has a copy of its own."""
_SLOW_SECONDS = 1.0

_log = logging.getLogger(__name__)


def right_singular_vectors(weight: torch.Tensor, module: str) -> torch.Tensor:
    """Vh of a weight (p, q): (min(p, q), q) float32. module: for messages."""
    started = time.monotonic()
    try:
        vh: torch.Tensor = torch.linalg.svd(weight.detach().to("cpu", torch.float32), full_matrices=False)[2]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BaseModelMismatch(f"the weights of {module} have no singular vectors: {error}", field=module) from error
    seconds = time.monotonic() - started
    if seconds > _SLOW_SECONDS:
        _log.info("the singular vectors of %s, %s, took %.1f s", module, tuple(weight.shape), seconds)
    return vh


class Projectors:
    """Thread-safe; each layer's are computed by one thread at a time. Matrices in use are in memory once.

    folder: where they are kept; None: nowhere. base: None: there are none, and asking raises `UnsupportedAdapter`. step:
    rows are kept on disk in multiples of this; if it is as large as the ranks in use, nothing is ever computed twice.
    """

    def __init__(self, folder: Path | None = None, base: BaseDescription | None = None, *, step: int = _STEP) -> None:
        self._step = step
        self._folder = folder
        self._base = base
        self._lock = threading.Lock()
        self._working: dict[str, threading.Lock] = {}
        self._known: WeakValueDictionary[str, SharedMatrix] = WeakValueDictionary()
        self._digests: dict[str, dict[int, str]] = {}
        """Module -> rank -> digest, of rows that were served: others must not come after them."""

    def get(self, module: str, rank: int) -> SharedMatrix:
        """P of at least `rank` rows for a linear layer of the base, with the key "base-svd:<module>".

        Raises `UnsupportedAdapter`, `InvalidAdapter` for a rank that the layer does not have, and rather than serve other
        vectors than before `StoreCorrupted` or `BaseModelMismatch`.
        """
        base = self._checked_base(module, rank)
        with self._lock_of(module):
            return self._get(base, module, rank)

    def digest(self, module: str, rank: int) -> str:
        """SHA-256 of P[:rank] as float32 little-endian bytes: 64 hexadecimal digits. Raises as `get`."""
        base = self._checked_base(module, rank)
        with self._lock_of(module):
            digests = self._digests.setdefault(module, {})
            if rank not in digests:
                digests[rank] = rows_digest(self._get(base, module, rank).matrix[:rank])
            return digests[rank]

    def _checked_base(self, module: str, rank: int) -> BaseDescription:
        if self._base is None:
            message = f"the singular vectors of {module} are needed, and there is no base model to take them from"
            raise UnsupportedAdapter(message, field=module)
        shape = self._base.shape(module)
        if not 1 <= rank <= min(shape):
            raise InvalidAdapter(f"{module} is {shape} and has no {rank} singular vectors", field="rank")
        return self._base

    def _lock_of(self, module: str) -> threading.Lock:
        with self._lock:
            return self._working.setdefault(module, threading.Lock())

    def _get(self, base: BaseDescription, module: str, rank: int) -> SharedMatrix:
        """With the module's lock held."""
        with self._lock:
            known = self._known.get(module)
        if known is not None and len(known.matrix) >= rank:
            return known
        wanted = -(-rank // _STEP) * _STEP
        rows = self._load_or_compute(base, module, rank)[:wanted].clone(memory_format=torch.contiguous_format)
        if known is not None and not torch.equal(rows[: len(known.matrix)], known.matrix):
            raise _changed(module)
        served = max((r for r in self._digests.get(module, {}) if r <= len(rows)), default=0)
        if served and rows_digest(rows[:served]) != self._digests[module][served]:
            raise _changed(module)
        found = SharedMatrix(BASE_SVD + module, rows)
        with self._lock:
            self._known[module] = found
        return found

    def _load_or_compute(self, base: BaseDescription, module: str, rank: int) -> torch.Tensor:
        """At least `rank` rows; what is computed is on disk on return."""
        shape = base.shape(module)
        file = None if self._folder is None else ProjectorFile(self._folder, module, shape, base.fingerprint)
        stored = None if file is None else file.read()
        if stored is not None and stored.rows is not None and stored.facts.rank >= rank:
            return stored.rows
        vectors = right_singular_vectors(base.weight(module), module)
        keep = max(-(-rank // self._step) * self._step, 0 if stored is None else stored.facts.rank)
        if stored is not None:
            _check_recomputed(stored, vectors)
        rows = vectors[:keep].contiguous()
        if file is not None:
            file.write(rows)
        return rows


def _check_recomputed(stored: StoredRows, vectors: torch.Tensor) -> None:
    """Raises unless the vectors begin with those that are, or were, in the file."""
    facts = stored.facts
    if rows_digest(vectors[: facts.rank]) == facts.digest:
        return
    if stored.rows is None:
        raise StoreCorrupted(
            f"the stored singular vectors of {facts.module} are broken, and computed again they are not the same"
        )
    raise _changed(facts.module)


def _changed(module: str) -> BaseModelMismatch:
    return BaseModelMismatch(
        f"the singular vectors of {module} are not those of before: its weights, the CPU or the number of threads changed",
        field=module,
    )
