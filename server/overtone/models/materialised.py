"""Deltas of long prompts as dense matrices, where a product costs less than frames and a large sparse core for every token.

    implicit: n E + (p + q) C + (N_in log2 N_in + N_out log2 N_out) F       materialised: p q

are the costs of a token, in multiply-adds of a dense product. A dense delta is made by the implicit way on q unit vectors:
it pays once  tokens (implicit - p q) > q implicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from overtone.kernels import CsrCore, FrameKind
from overtone.models.channels import PreparedTerm

SPARSE_ENTRY = 40.0
"""E: an entry of a sparse core applied to a token costs as much as so many multiply-adds of a dense product."""
COEFFICIENT = 40.0
"""C: the same for a coefficient that is read or written between frame and core."""
TRANSFORM_STEP = 12.0
"""F: the same for N log2 N of a fast transform. All as `python -m bench.prompt_paths` measured them on 2 CPU cores."""
BUDGET_BYTES = 256 << 20
"""The most that dense deltas may take; beyond it prompts go the implicit way."""

_FAST = (FrameKind.DCT, FrameKind.DFT)


def pays(term: PreparedTerm, shape: tuple[int, int], tokens: int) -> bool:
    """Whether a dense delta (p, q) for `tokens` tokens costs less than the implicit way, its making included."""
    implicit = _implicit(term, shape)
    p, q = shape
    return implicit is not None and tokens * (implicit - p * q) > q * implicit


def _implicit(term: PreparedTerm, shape: tuple[int, int]) -> float | None:
    """Multiply-adds of a dense product that take as long as a token the implicit way; None: not known, so not dense."""
    assert isinstance(term.core, CsrCore)
    steps = 0.0
    for frame, size in zip((term.synthesis, term.analysis), shape, strict=True):
        if frame.kind in _FAST:
            steps += size * math.log2(max(2, size))
        elif frame.kind is not FrameKind.IDENTITY:
            return None
    return SPARSE_ENTRY * term.core.values.numel() + COEFFICIENT * sum(shape) + TRANSFORM_STEP * steps


def may_be_dense(term: PreparedTerm) -> bool:
    """Whether there are prompts for which `pays`."""
    return isinstance(term.core, CsrCore)


class Materialised:
    """The dense deltas of the prompts that are being computed. What a step does not ask for, the next one no longer has."""

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self._budget = budget
        self._kept: dict[int, tuple[PreparedTerm, torch.Tensor]] = {}
        self._used: set[int] = set()

    @property
    def nbytes(self) -> int:
        return sum(delta.numel() * delta.element_size() for _, delta in self._kept.values())

    def begin_step(self) -> None:
        self._kept = {key: held for key, held in self._kept.items() if key in self._used}
        self._used = set()

    def of(
        self, term: PreparedTerm, shape: tuple[int, int], tokens: int, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """delta_W^T (q, p) float32 of `term`, made by `make` if it is new and pays for `tokens` tokens; None: go the other
        way."""
        held = self._kept.get(id(term))
        if held is None:
            if not pays(term, shape, tokens) or self.nbytes + 4 * shape[0] * shape[1] > self._budget:
                return None
            held = self._kept[id(term)] = term, make()
        self._used.add(id(term))
        return held[1]
