"""SHiRA: a few weights changed, each by itself (NeurIPS 2024, arXiv 2406.13175), as PEFT 0.21.2 saves them.

    delta_W[row_i, col_i] += v_i        n = r (p + q) of them

`<module>.shira_weight` (n,): v; `<module>.shira_indices` (2, n): rows and columns, int32, or from Windows the same numbers
as float32. Whatever mask they once came from, these are the locations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.families.coefficients import check_range
from overtone.adapters.families.config import FLAG, NOT_TRUE, POSITIVE, TEXT, AdapterConfig, Rule
from overtone.adapters.families.tensors import Stored, by_module, check_finite
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, NonFiniteAdapter
from overtone.kernels import IDENTITY, Delta, SparseCore, Term, sparse_core

_PEFT_RANK = 32
_VALUES, _INDICES = "shira_weight", "shira_indices"


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    rank = config.count("r") or _PEFT_RANK
    deltas, count = {}, 0
    for module, parts in by_module(tensors, (_VALUES, _INDICES)).items():
        p, q = shape = context.base.shape(module)
        if rank * (p + q) > p * q:
            message = f"r {shown(rank)} makes more entries than {shown(module)}, which is {shape}, has weights"
            raise InvalidAdapter(message, field="r")
        core = _core(parts[_VALUES], parts[_INDICES], rank * (p + q), shape)
        deltas[module] = Delta((Term(IDENTITY, core, IDENTITY),), shape)
        count += rank * (p + q)
    return ParsedWeights(deltas, count)


def _core(weight: Stored, indices: Stored, n: int, shape: tuple[int, int]) -> SparseCore:
    values = weight.floats((n,))
    rows, cols = _locations(indices, n, shape)
    core = sparse_core(rows, cols, values, shape)
    if not bool(core.values.isfinite().all()):
        raise NonFiniteAdapter(f"{weight.name} overflows float32 once duplicates are added", field=weight.name)
    return core


def _locations(stored: Stored, n: int, shape: tuple[int, int]) -> torch.Tensor:
    """(2, n) int64 within `shape`."""
    if stored.tensor.dtype == torch.float32:
        stored.check_shape((2, n))
        check_finite(stored.name, stored.tensor)
        if not torch.equal(stored.tensor, stored.tensor.trunc()):
            raise InvalidAdapter(f"{stored.name} must hold whole numbers", field=stored.name)
        numbers = stored.tensor
    else:
        numbers = stored.integers((2, n))
    for axis, size in enumerate(shape):
        check_range(stored.name, axis, numbers[axis], 0, size - 1)
    return numbers.to(torch.int64)


SHIRA = Family(
    name="shira",
    keys={
        "r": POSITIVE,
        # Training only: how the locations were chosen, which the file holds.
        "mask_type": TEXT,
        "random_seed": Rule(lambda v: v is None or type(v) is int, "a whole number or null"),
        "init_weights": FLAG,
        # PEFT has no SHiRA for Conv1D, so nobody says which way round its places would be.
        "fan_in_fan_out": NOT_TRUE,
    },
    parse=_parse,
)
