"""Every operator that is measured."""

from __future__ import annotations

from bench.cases import layers, low_rank, prompts, spectral
from bench.cases.common import Operator

OPERATORS: tuple[Operator, ...] = (
    *spectral.OPERATORS,
    *low_rank.OPERATORS,
    *prompts.OPERATORS,
    *layers.OPERATORS,
)
