"""An adapter's tensors by module: what every family checks of them before it reads its own meaning into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.text import shown
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter
from overtone.kernels.cores import all_finite

PREFIX = "base_model.model."
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})
_BASE_COPIES = (".base_layer.weight", ".base_layer.bias")


@dataclass(frozen=True)
class Stored:
    """A tensor as it was saved. name: for messages, printable."""

    name: str
    tensor: torch.Tensor

    def floats(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, which must have `shape` and hold finite floating-point numbers; float64 comes as float32.

        Raises `InvalidAdapter`, `NonFiniteAdapter`.
        """
        self.check_shape(shape)
        return self.any_floats()

    def any_floats(self) -> torch.Tensor:
        """`floats` of any shape that is not empty."""
        self.check_floats()
        if self.tensor.dtype != torch.float64:
            return self.tensor
        narrow = self.tensor.to(torch.float32)
        check_finite(self.name, narrow, "once narrowed to float32")
        return narrow

    def check_floats(self) -> None:
        """Raises unless the tensor holds finite floating-point numbers, at least one."""
        self.check_dtype()
        if not self.tensor.numel():
            raise InvalidAdapter(f"{self.name} is empty: its shape is {tuple(self.tensor.shape)}", field=self.name)
        check_finite(self.name, self.tensor)

    def check_dtype(self) -> None:
        """Raises unless the tensor holds floating-point numbers."""
        if self.tensor.dtype not in _FLOATS:
            raise InvalidAdapter(
                f"{self.name} must hold floating-point numbers, not {self.tensor.dtype}", field=self.name
            )

    def integers(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as int64, which must have `shape` and hold integers."""
        self.check_shape(shape)
        if self.tensor.dtype not in INTEGERS:
            raise InvalidAdapter(f"{self.name} must hold integers, not {self.tensor.dtype}", field=self.name)
        return self.tensor.to(torch.int64)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if tuple(self.tensor.shape) != shape:
            raise InvalidAdapter(
                f"{self.name} must have the shape {shape}, not {tuple(self.tensor.shape)}", field=self.name
            )


def by_module(
    tensors: Mapping[str, torch.Tensor], required: Collection[str], optional: Collection[str] = ()
) -> dict[str, dict[str, Stored]]:
    """Module -> part -> tensor, of tensors named base_model.model.<module>.<part>; parts may contain dots.

    Raises `InvalidAdapter` for a tensor that is no such part, for a module that lacks a required one, and if there are
    none at all.
    """
    modules: dict[str, dict[str, Stored]] = {}
    parts = sorted({*required, *optional}, key=len, reverse=True)
    for name in sorted(tensors):
        part = next((p for p in parts if name.endswith("." + p)), None)
        module = name.removeprefix(PREFIX).removesuffix(f".{part}")
        if part is None or not name.startswith(PREFIX) or not module:
            raise InvalidAdapter(f"{shown(name)} is not a tensor of this family", field=shown(name))
        modules.setdefault(module, {})[part] = Stored(shown(name), tensors[name])
    for module, found in modules.items():
        for part in required:
            if part not in found:
                beside = next(iter(found.values())).name
                missing = shown(f"{PREFIX}{module}.{part}")
                raise InvalidAdapter(f"{beside} has no {missing} beside it", field=beside)
    if not modules:
        raise InvalidAdapter("the adapter has no tensors", field=min(parts))
    return modules


def check_finite(name: str, tensor: torch.Tensor, when: str = "") -> None:
    """Raises `NonFiniteAdapter` with the first position that is not finite."""
    if not all_finite(tensor):
        position = [int(i) for i in (~tensor.isfinite()).nonzero()[0]]
        value = float(tensor[tuple(position)])
        message = f"{name}{position} is {value} {when}".rstrip()
        raise NonFiniteAdapter(message, field=name, metadata={"position": str(position)})


def without_base_copies(tensors: Mapping[str, torch.Tensor], base: BaseDescription) -> dict[str, torch.Tensor]:
    """`tensors` without the copies of frozen weights that PEFT saves beside adapted embeddings and heads.

    Raises `BaseModelMismatch` for a copy that differs from the base model: it was trained or resized, and would be lost.
    `InvalidAdapter` for a tensor without a name, which no message could tell.
    """
    if "" in tensors:
        raise InvalidAdapter("the adapter has a tensor without a name", field="tensors")
    kept = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in _BASE_COPIES if name.endswith(s)), None)
        if suffix is None or not name.startswith(PREFIX):
            kept[name] = tensor
            continue
        module = name.removeprefix(PREFIX).removesuffix(suffix)
        p, q = base.shape_of_any(module)
        if suffix == ".base_layer.weight" and _equals_base(tensor, base.weight(module), module in base.embeddings):
            continue
        message = f"{shown(name)} is not the served model's ({p}, {q}): this adapter changed the base model itself"
        raise BaseModelMismatch(message, field=shown(name))
    return kept


def _equals_base(copy: torch.Tensor, weight: torch.Tensor, embedding: bool) -> bool:
    """Whether `copy` is `weight` (p, q), as either of them was rounded; an embedding's is saved as (q, p)."""
    copy = copy.T if embedding and copy.ndim == 2 else copy
    if copy.shape != weight.shape or copy.dtype not in _FLOATS:
        return False
    coarse = max((copy.dtype, weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(copy.to(coarse), weight.cpu().to(coarse))
