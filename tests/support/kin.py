"""Random adapters with one configuration and one header of weights: kin, which differ in their numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from overtone.adapters import AdapterFiles, BaseDescription
from support.folders import FLOATS, INTEGERS, Draws, Folder

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kin:
    """odd: what was done to the numbers of each; nothing to the first's."""

    folder: Folder
    files: Sequence[AdapterFiles]
    odd: Sequence[str]

    @property
    def base(self) -> BaseDescription:
        return self.folder.base()


def safetensors_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """In the order of `tensors`, aligned or not."""
    header, parts, end = {}, [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [end, end + len(data)]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def _at(tensors: Tensors, kind: Callable[[torch.Tensor], bool], value: float) -> None:
    """One number of one tensor becomes `value`."""
    found = next((t for t in tensors.values() if kind(t) and t.numel()), None)
    if found is not None:
        found.view(-1)[-1] = value


def _is_values(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1


def _is_indices(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2


def _alike(tensors: Tensors) -> None:
    """All indices of one number of coefficients become those with the smallest."""
    indices = [t for t in tensors.values() if _is_indices(t)]
    for tensor in indices:
        same = [t for t in indices if t.shape == tensor.shape]
        tensor.copy_(min(same, key=lambda t: float(t.double().max())))


def _coincide(tensors: Tensors) -> None:
    for tensor in tensors.values():
        if _is_indices(tensor):
            tensor.copy_(tensor[:, :1].clone())


def _few(tensors: Tensors) -> None:
    """Most coefficients coincide with another."""
    for tensor in tensors.values():
        if _is_indices(tensor):
            tensor.copy_(tensor[:, torch.arange(tensor.shape[1]) // 3])


def _zeros(tensors: Tensors) -> None:
    for tensor in tensors.values():
        if _is_values(tensor):
            tensor.copy_(torch.zeros_like(tensor).neg())


def _large(tensors: Tensors) -> None:
    for tensor in tensors.values():
        if _is_values(tensor):
            tensor.fill_(torch.finfo(tensor.dtype).max)


ODDITIES: Mapping[str, Callable[[Tensors], None]] = {
    "nothing": lambda tensors: None,
    "alike": _alike,
    "coincide": _coincide,
    "few": _few,
    "negative zeros": _zeros,
    "large": _large,
    "nan": lambda tensors: _at(tensors, _is_values, torch.nan),
    "infinite": lambda tensors: _at(tensors, _is_values, -torch.inf),
    "beyond": lambda tensors: _at(tensors, _is_indices, 25),
    "negative": lambda tensors: _at(tensors, lambda t: _is_indices(t) and t.dtype != torch.uint8, -1),
    "at the end": lambda tensors: _at(tensors, _is_indices, 1),
}


@st.composite
def kin(draw: Callable[[st.SearchStrategy[Any]], Any], family: st.SearchStrategy[Folder]) -> Kin:
    folder, d = draw(family), Draws(draw)
    values, fractions, integers = d.one_of(*FLOATS), d.one_of(*FLOATS), d.one_of(*INTEGERS)
    names = draw(st.permutations(list(folder.tensors))) if d.flag() else sorted(folder.tensors)
    config = json.dumps(dict(folder.config)).encode()

    def numbers(name: str) -> torch.Tensor:
        like = folder.tensors[name]
        if _is_values(like):
            return d.floats(*like.shape, dtypes=(values,))
        if like.is_floating_point():
            return d.uniform(*like.shape).to(fractions)
        shape = folder.linears[name.removeprefix("base_model.model.").rpartition(".")[0]].shape
        return torch.stack([d.below(size, like.shape[1]) for size in shape]).to(integers)

    files, odd = [], ["nothing", *draw(st.lists(st.sampled_from(list(ODDITIES)), min_size=1, max_size=5))]
    for what in odd:
        tensors = {name: numbers(name) for name in names}
        ODDITIES[what](tensors)
        files.append(AdapterFiles(config, safetensors_file(tensors)))
    return Kin(folder, files, odd)
