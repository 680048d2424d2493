"""What the families of sparse DCT coefficients share: their tensors by module, their checks, the fold into a `Delta`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import AdapterConfig
from overtone.adapters.families.tensors import INTEGERS, Stored, by_module, check_finite
from overtone.adapters.families.types import ParsedWeights
from overtone.errors import AdapterIndexOutOfRange, InvalidAdapter, NonFiniteAdapter
from overtone.kernels import DCT, Delta, SparseCore, SparsePattern, Term, sparse_core

AXES = ("row", "column")


@dataclass(frozen=True)
class Coefficients:
    """One module's tensors as stored. values: (n,) floating point, finite; indices: (2, n), unchecked but for shape."""

    values_name: str
    values: torch.Tensor
    indices_name: str
    indices: torch.Tensor


Fold = Callable[[Coefficients, tuple[int, int]], tuple[torch.Tensor, torch.Tensor]]
"""(coefficients, (p, q)) -> indices (2, n) int64 within (p, q), orthonormal coefficients (n,) float64."""


def parse_coefficients(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], base: BaseDescription, indices_suffix: str, fold: Fold
) -> ParsedWeights:
    """delta_W = C_p^T K C_q for every module that has tensors; K from `fold`, duplicates add."""
    pairs = {
        module: Coefficients(
            parts["spectrum"].name, parts["spectrum"].tensor, parts[indices_suffix].name, parts[indices_suffix].tensor
        )
        for module, parts in by_module(tensors, ("spectrum", indices_suffix)).items()
    }
    deltas = {}
    for module, stored in pairs.items():
        shape = base.shape(module)
        check_values(stored, config.count("n_frequency"))
        indices, values = fold(stored, shape)
        core = filled(sparse_core(indices[0], indices[1], values, shape), values.numel())
        if not bool(core.values.isfinite().all()):
            message = f"{stored.values_name} overflows float32 once its scale is applied and duplicates are added"
            raise NonFiniteAdapter(message, field=stored.values_name)
        deltas[module] = Delta((Term(DCT, core, DCT),), shape)
    return ParsedWeights(deltas, sum(stored.values.numel() for stored in pairs.values()))


def filled(core: SparseCore, n: int) -> SparseCore:
    """`core` with n entries, or as many as its plane (p, q) has: zeros at the free locations r q + c that come first.

    Coordinates that came twice are one entry; this gives their place to one that changes nothing, so that adapters of one
    recipe have layouts of one size wherever their locations happen to coincide.
    """
    p, q = core.shape
    missing = min(n, p * q) - core.nnz
    if missing <= 0:
        return core
    flat = core.rows.to(torch.int64) * q + core.cols
    free = torch.ones(min(n, p * q), dtype=torch.bool)
    free[flat[flat < len(free)]] = False
    extra = free.nonzero()[:missing, 0]
    places, order = torch.cat((flat, extra)).sort()
    pattern = SparsePattern((places // q).to(torch.int32), (places % q).to(torch.int32), core.shape)
    return SparseCore(pattern, torch.cat((core.values, torch.zeros(missing)))[order])


def check_values(stored: Coefficients, n_frequency: int | None) -> None:
    """Raises for a spectrum that is not (n,) finite floats, n >= 1 (= n_frequency), or indices that are not (2, n)."""
    name, values, n = stored.values_name, stored.values, stored.values.numel()
    if values.ndim != 1 or n == 0:
        raise InvalidAdapter(f"{name} must have the shape (n,) with n >= 1, not {tuple(values.shape)}", field=name)
    Stored(name, values).check_floats()
    if n_frequency is not None and n != n_frequency:
        raise InvalidAdapter(f"{name} has {n} coefficients, but n_frequency is {n_frequency}", field=name)
    Stored(stored.indices_name, stored.indices).check_shape((2, n))
    if stored.indices.is_floating_point():
        check_finite(stored.indices_name, stored.indices)


def integer_indices(stored: Coefficients, shape: tuple[int, int]) -> torch.Tensor:
    """(2, n) int64: row = output frequency in [0, p), column = input frequency in [0, q)."""
    name = stored.indices_name
    if stored.indices.dtype not in INTEGERS:
        raise InvalidAdapter(f"{name} must hold integers, not {stored.indices.dtype}", field=name)
    indices = stored.indices.to(torch.int64)
    for axis, (line, limit) in enumerate(zip(indices, shape, strict=True)):
        check_range(name, axis, line, 0, limit - 1)
    return indices


def check_range(name: str, axis: int, line: torch.Tensor, low: int, high: int) -> None:
    """Raises `AdapterIndexOutOfRange` with the first of `line` (n,) that is outside [low, high]."""
    outside = (line < low) | (line > high)
    if bool(outside.any()):
        position = int(outside.nonzero()[0])
        value = line[position].item()
        raise AdapterIndexOutOfRange(
            f"{name}[{axis}, {position}] ({AXES[axis]}) is {value}, outside {low}..{high}",
            field=name,
            metadata={"axis": AXES[axis], "value": str(value), "limit": str(high)},
        )
