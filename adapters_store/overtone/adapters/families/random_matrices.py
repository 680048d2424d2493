"""What VeRA and RandLoRA share: two random matrices for a whole adapter, either in the file or drawn again from a seed.

As PEFT 0.21.2 has it: `save_projection` says which of the two, `projection_prng_key` is the seed of torch's generator on the
CPU, and the size is that of the largest adapted layer, of which smaller ones use a leading part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import AdapterConfig, Rule
from overtone.adapters.families.tensors import Stored, check_finite
from overtone.adapters.memo import Memo
from overtone.adapters.safetensors_writer import key_of
from overtone.errors import InvalidAdapter, UnsupportedAdapter
from overtone.kernels import SharedMatrix

Shape = tuple[int, int]

"""How many numbers are drawn at most: 1 GiB. A small file can ask for as many as the rank that it claims takes."""

RANDOM_KEYS: Mapping[str, Rule] = {
    # Null, which PEFT takes for false here and refuses there, is not what PEFT writes.
    "save_projection": Rule(lambda v: isinstance(v, bool), "true or false"),
    "projection_prng_key": Rule(
        lambda v: type(v) is int and -(2**63) <= v < 2**64, "a whole number from -2^63 to 2^64 - 1"
    ),
}


def is_saved(config: AdapterConfig) -> bool:
    return config.flag("save_projection", True)


def seed_of(config: AdapterConfig) -> int:
    return config.count("projection_prng_key") or 0


def largest(shapes: Iterable[Shape]) -> Shape:
    """The most outputs and the most inputs, which need not be one layer's."""
    outputs, inputs = zip(*shapes, strict=True)
    return max(outputs), max(inputs)


def take_saved(tensors: dict[str, torch.Tensor], names: tuple[str, str], config: AdapterConfig) -> list[Stored]:
    """The two matrices, taken out of `tensors`; none if they are to be drawn.

    Raises `InvalidAdapter` if they are missing, or there although the configuration says that they are not: PEFT would
    ignore them.
    """
    found = [Stored(name, tensors.pop(name)) for name in names if name in tensors]
    if is_saved(config):
        missing = next((name for name in names if name not in {s.name for s in found}), None)
        if missing is not None:
            raise InvalidAdapter(f"{missing} is missing, but save_projection is true", field=missing)
    elif found:
        raise InvalidAdapter(f"{found[0].name} is there, but save_projection is false", field=found[0].name)
    return found


def at_least(stored: Stored, shape: tuple[int, ...], growing: tuple[int, ...]) -> torch.Tensor:
    """The tensor, finite floats of `shape` or larger along the dimensions `growing`."""
    found = tuple(stored.tensor.shape)
    right = len(found) == len(shape) and all(
        size >= least if i in growing else size == least
        for i, (size, least) in enumerate(zip(found, shape, strict=False))
    )
    if not right:
        wanted = ", ".join(f">= {size}" if i in growing else str(size) for i, size in enumerate(shape))
        raise InvalidAdapter(f"{stored.name} must have the shape ({wanted}), not {found}", field=stored.name)
    return stored.any_floats()


def shared_matrix(matrix: torch.Tensor, memo: Memo) -> SharedMatrix:
    """`matrix` (m, N) under the key of its content; equal contents are one object while the memo remembers it."""
    found = _keyed(matrix)
    return memo.get(("matrix", found.key), lambda: (found, found.matrix))[0]


def _keyed(matrix: torch.Tensor) -> SharedMatrix:
    matrix = matrix.to(torch.float32).contiguous()
    return SharedMatrix(key_of(matrix=matrix), matrix)


def check_drawable(numbers: int, allowed: int) -> None:
    """Raises `UnsupportedAdapter` for more numbers than we draw."""
    if numbers > allowed:
        message = (
            f"save_projection is false and {numbers} numbers would have to be drawn, more than the {allowed} allowed"
        )
        raise UnsupportedAdapter(message, field="save_projection")


def dtypes_of(modules: Iterable[str], base: BaseDescription) -> tuple[torch.dtype, ...]:
    """The floating-point dtypes of the adapted weights, in the order in which the model has them.

    PEFT rounds what it has drawn to the dtype of every layer that shares it, and only then widens it to float32.
    """
    adapted = frozenset(modules)
    found = (base.weight(module).dtype for module in base.modules if module in adapted)
    return tuple(dict.fromkeys(dtype for dtype in found if dtype.is_floating_point))


def as_drawn(
    drawn: tuple[torch.Tensor, torch.Tensor], dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rounded as PEFT does, float32. Raises `NonFiniteAdapter`: some seeds draw no usable sparse matrix."""
    rounded = []
    for matrix in drawn:
        for dtype in dtypes:
            matrix = matrix.to(dtype)
        rounded.append(matrix.to(torch.float32))
        check_finite("projection_prng_key", rounded[-1], "in the matrices that it draws")
    return rounded[0], rounded[1]


def shared_pair(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[SharedMatrix, SharedMatrix, torch.Tensor, torch.Tensor]:
    """A value for the memo: both matrices under their keys, and their tensors, to be counted."""
    a, b = _keyed(first), _keyed(second)
    return a, b, a.matrix, b.matrix
