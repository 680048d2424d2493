"""Deltas of long prompts as dense matrices, where a product costs less than frames and a large sparse core for every token.

    implicit: n E + (p log2 p + q log2 q) F        materialised: p q

are the costs of a token, in multiply-adds of a dense product. A dense delta is made by the implicit way on q unit vectors:
it pays once  tokens (implicit - p q) > q implicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from overtone.kernels import CsrCore, FrameKind
from overtone.models.channels import PreparedTerm

BUDGET_BYTES = 256 << 20
"""The most that dense deltas may take; beyond it prompts go the implicit way."""

_FAST = (FrameKind.DCT, FrameKind.DFT)


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What a token costs the implicit way, in multiply-adds of a dense product.

    entry: E, for an entry of a sparse core; step: F, for N log2 N of a fast transform.
    """

    entry: float
    step: float

    def implicit(self, entries: int, sizes: Sequence[int]) -> float:
        """sizes: of the fast transforms."""
        return self.entry * entries + self.step * steps(sizes)


BY_NATIVE_KERNELS = TokenCost(6.5, 6.5)
BY_TORCH = TokenCost(8.0, 42.0)
"""As `python -m bench.prompt_paths` measured both on 2 CPU cores."""


def steps(sizes: Sequence[int]) -> float:
    """The sum of N log2 N."""
    return sum(size * math.log2(max(2, size)) for size in sizes)


def pays(term: PreparedTerm, shape: tuple[int, int], tokens: int, cost: TokenCost) -> bool:
    """Whether a dense delta (p, q) for `tokens` tokens costs less than the implicit way, its making included."""
    assert isinstance(term.core, CsrCore)
    frames = list(zip((term.synthesis, term.analysis), shape, strict=True))
    if any(frame.kind not in (*_FAST, FrameKind.IDENTITY) for frame, _ in frames):
        return False  # what those cost is not known
    implicit = cost.implicit(term.core.values.numel(), [size for frame, size in frames if frame.kind in _FAST])
    p, q = shape
    return tokens * (implicit - p * q) > q * implicit


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

    def may_serve(self, tokens: int, inputs: int) -> bool:
        """Whether to ask `of` for a prompt's term at all: making a delta takes `inputs` rows the implicit way, so it can pay
        only for more tokens than that; one that is there serves any."""
        return bool(self._kept) or tokens > inputs

    def of(
        self,
        term: PreparedTerm,
        shape: tuple[int, int],
        tokens: int,
        cost: TokenCost,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor | None:
        """delta_W^T (q, p) float32 of `term`, made by `make` if it is new and pays for `tokens` tokens; None: go the other
        way, at `cost`."""
        held = self._kept.get(id(term))
        if held is None:
            if not pays(term, shape, tokens, cost) or self.nbytes + 4 * shape[0] * shape[1] > self._budget:
                return None
            held = self._kept[id(term)] = term, make()
        self._used.add(id(term))
        return held[1]
