"""What the families of sparse DCT coefficients share: their tensors by module, their checks, the fold into a `Delta`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import AdapterConfig
from overtone.adapters.families.types import ParsedWeights
from overtone.adapters.text import shown
from overtone.errors import AdapterIndexOutOfRange, InvalidAdapter, NonFiniteAdapter
from overtone.kernels import Delta, FrameKind, sparse_core

PREFIX = "base_model.model."
AXES = ("row", "column")
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})


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
    pairs = pair_tensors(tensors, indices_suffix)
    deltas = {}
    for module, stored in pairs.items():
        shape = base.shape(module)
        check_values(stored, config.n_frequency)
        indices, values = fold(stored, shape)
        core = sparse_core(indices[0], indices[1], values, shape)
        if not bool(core.values.isfinite().all()):
            message = f"{stored.values_name} overflows float32 once its scale is applied and duplicates are added"
            raise NonFiniteAdapter(message, field=stored.values_name)
        deltas[module] = Delta(FrameKind.DCT, core, FrameKind.DCT)
    return ParsedWeights(deltas, sum(stored.values.numel() for stored in pairs.values()))


def pair_tensors(tensors: Mapping[str, torch.Tensor], indices_suffix: str) -> dict[str, Coefficients]:
    """Every module's spectrum with its indices. Raises `InvalidAdapter` for a tensor that is neither or lacks its twin."""
    modules = []
    for name in sorted(tensors):
        stem, _, suffix = name.rpartition(".")
        if not stem.startswith(PREFIX) or suffix not in ("spectrum", indices_suffix):
            raise InvalidAdapter(f"{shown(name)} is not a tensor of this family", field=shown(name))
        twin = f"{stem}.{indices_suffix if suffix == 'spectrum' else 'spectrum'}"
        if twin not in tensors:
            raise InvalidAdapter(f"{shown(name)} has no {shown(twin)} beside it", field=shown(name))
        if suffix == "spectrum":
            modules.append(stem.removeprefix(PREFIX))
    if not modules:
        raise InvalidAdapter("the adapter has no tensors", field="spectrum")
    return {module: _pair(tensors, module, indices_suffix) for module in modules}


def _pair(tensors: Mapping[str, torch.Tensor], module: str, indices_suffix: str) -> Coefficients:
    values_name, indices_name = f"{PREFIX}{module}.spectrum", f"{PREFIX}{module}.{indices_suffix}"
    return Coefficients(shown(values_name), tensors[values_name], shown(indices_name), tensors[indices_name])


def check_values(stored: Coefficients, n_frequency: int | None) -> None:
    """Raises for a spectrum that is not (n,) finite floats, n >= 1 (= n_frequency), or indices that are not (2, n)."""
    name, values, n = stored.values_name, stored.values, stored.values.numel()
    if values.ndim != 1 or n == 0:
        raise InvalidAdapter(f"{name} must have the shape (n,) with n >= 1, not {tuple(values.shape)}", field=name)
    if values.dtype not in _FLOATS:
        raise InvalidAdapter(f"{name} must hold floating-point numbers, not {values.dtype}", field=name)
    if n_frequency is not None and n != n_frequency:
        raise InvalidAdapter(f"{name} has {n} coefficients, but n_frequency is {n_frequency}", field=name)
    _check_finite(name, values)
    if tuple(stored.indices.shape) != (2, n):
        message = f"{stored.indices_name} must have the shape (2, {n}), not {tuple(stored.indices.shape)}"
        raise InvalidAdapter(message, field=stored.indices_name)
    if stored.indices.is_floating_point():
        _check_finite(stored.indices_name, stored.indices)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        position = [int(i) for i in (~tensor.isfinite()).nonzero()[0]]
        value = float(tensor[tuple(position)])
        raise NonFiniteAdapter(f"{name}{position} is {value}", field=name, metadata={"position": str(position)})


def integer_indices(stored: Coefficients, shape: tuple[int, int]) -> torch.Tensor:
    """(2, n) int64: row = output frequency in [0, p), column = input frequency in [0, q)."""
    name = stored.indices_name
    if stored.indices.dtype not in _INTEGERS:
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
