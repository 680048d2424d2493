"""Ways to break an adapter folder, each at a random place. Bytes and file names: `breaking_bytes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from overtone.adapters.families import FAMILIES
from overtone.adapters.families.config import COMMON_KEYS
from support.folders import FLOATS, INTEGERS, NAMES, Draws, Folder
from support.oracle_tensors import PREFIX

Break = Callable[[Draws, Folder], Folder]

_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64, 10**400, -0.5, 0.5, 1e308, -1e308, 5e-324),
    *(
        "",
        "NaN",
        "Infinity",
        "1",
        "none",
        "all",
        "x" * 300,
        "\u202e\n",
        [],
        [1],
        ["q_proj"],
        [[]],
        [None],
        {},
        {"a": 1},
    ),
    *({"q_proj": 10**18}, {".*": 1}, {"(a+)+$": 2}, {"[": 1}, {"": 1}, {"q_proj": "1"}, [0] * 50, *FAMILIES),
)
_OTHER_DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.float8_e4m3fn, torch.uint16, torch.complex64)


def _with_config(folder: Folder, **changes: Any) -> Folder:
    """`...` takes a key away."""
    config = {key: value for key, value in {**folder.config, **changes}.items() if value is not ...}
    return replace(folder, config=config)


def _with_tensors(folder: Folder, changes: Mapping[str, torch.Tensor | None]) -> Folder:
    tensors = {name: tensor for name, tensor in {**folder.tensors, **changes}.items() if tensor is not None}
    return replace(folder, tensors=tensors)


def _some(d: Draws, folder: Folder) -> tuple[str, torch.Tensor]:
    name = d.one_of(*folder.tensors)
    return name, folder.tensors[name]


def key_removed(d: Draws, folder: Folder) -> Folder:
    return _with_config(folder, **{d.one_of(*folder.config): ...})


def key_changed(d: Draws, folder: Folder) -> Folder:
    """A key that is there, or another one of the family."""
    family = "PICA" if folder.pica else folder.config.get("peft_type")
    known = [*COMMON_KEYS, *(FAMILIES[family].keys if family in FAMILIES else ())]
    return _with_config(folder, **{d.one_of(*(folder.config if d.flag() else known)): d.one_of(*_ODD_VALUES)})


def target_removed(d: Draws, folder: Folder) -> Folder:
    targets = folder.config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        return key_removed(d, folder)
    gone = d.one_of(*targets)
    return _with_config(folder, target_modules=[target for target in targets if target != gone])


def renamed(d: Draws, folder: Folder) -> Folder:
    """To a name of nothing, of another layer's tensor, or of the base's."""
    name, tensor = _some(d, folder)
    return _with_tensors(folder, {name: None, _other_name(d, name): tensor})


def duplicated(d: Draws, folder: Folder) -> Folder:
    name, tensor = _some(d, folder)
    return _with_tensors(folder, {_other_name(d, name): tensor})


def _other_name(d: Draws, name: str) -> str:
    part = name.rpartition(".")[2]
    return str(
        d.one_of(
            name + "x",
            name.removeprefix(PREFIX),
            name.replace("lora_A", "lora_B"),
            f"{PREFIX}{d.one_of(*NAMES)}.{part}",
            f"{PREFIX}{d.one_of(*NAMES)}.base_layer.weight",
            f"basis.{d.one_of(*NAMES)}",
            f"{PREFIX}.{part}",
            PREFIX,
            "",
            "\u202e\n" * 200,
        )
    )


def dropped(d: Draws, folder: Folder) -> Folder:
    return _with_tensors(folder, {_some(d, folder)[0]: None})


def transposed(d: Draws, folder: Folder) -> Folder:
    name, tensor = _some(d, folder)
    return _with_tensors(folder, {name: tensor.permute(*reversed(range(tensor.ndim)))})


def reshaped(d: Draws, folder: Folder) -> Folder:
    """No dimension, one more, only one, or nothing left."""
    name, tensor = _some(d, folder)
    flat = tensor.flatten()
    return _with_tensors(folder, {name: d.one_of(tensor.new_ones(()), tensor[None], flat, flat[:0])})


def cut(d: Draws, folder: Folder) -> Folder:
    name, tensor = _some(d, folder)
    axis = d.integer(0, tensor.ndim - 1) if tensor.ndim else 0
    return _with_tensors(
        folder, {name: tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1)) if tensor.ndim else tensor}
    )


def widened(d: Draws, folder: Folder) -> Folder:
    name, tensor = _some(d, folder)
    axis = d.integer(0, tensor.ndim - 1) if tensor.ndim else 0
    return _with_tensors(folder, {name: torch.cat((tensor, tensor), axis) if tensor.ndim else tensor[None]})


def retyped(d: Draws, folder: Folder) -> Folder:
    name, tensor = _some(d, folder)
    return _with_tensors(folder, {name: tensor.to(d.one_of(*_OTHER_DTYPES))})


def not_finite(d: Draws, folder: Folder) -> Folder:
    floats = [name for name, tensor in folder.tensors.items() if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return dropped(d, folder)
    return _with_value(d, folder, d.one_of(*floats), d.one_of(math.nan, math.inf, -math.inf))


def _with_value(d: Draws, folder: Folder, name: str, value: float) -> Folder:
    changed = folder.tensors[name].clone(memory_format=torch.contiguous_format)
    changed.view(-1)[int(d.below(changed.numel(), 1))] = value
    return _with_tensors(folder, {name: changed})


DOUBTFUL: tuple[Break, ...] = (
    *(key_removed, key_changed, key_changed, target_removed, renamed, duplicated, dropped, transposed, reshaped),
    *(cut, widened, retyped, not_finite),
)
"""Most of what these make is to be refused; what is not must mean what it says."""


def key_unknown(d: Draws, folder: Folder) -> Folder:
    return _with_config(
        folder, **{d.one_of("surprise", "Scale", "r ", "__class__", "x" * 1000, ""): d.one_of(*_ODD_VALUES)}
    )


def nan_text(d: Draws, folder: Folder) -> Folder:
    """NaN, Infinity and -Infinity, which are not JSON but pass Python's reader."""
    return _with_config(folder, **{d.one_of(*folder.config): d.one_of(math.nan, [math.inf], {"a": -math.inf})})


def target_without_tensors(d: Draws, folder: Folder) -> Folder:
    targets = folder.config.get("target_modules")
    return _with_config(folder, target_modules=[*(targets if isinstance(targets, list) else ()), "nothing_proj"])


def layer_without_tensors(d: Draws, folder: Folder) -> Folder:
    return _with_config(folder, layers_to_transform=d.one_of(77, [77], [77, 78]))


def module_unknown(d: Draws, folder: Folder) -> Folder:
    """All tensors of one module belong to one that the base does not have."""
    if folder.pica:
        kind = d.one_of(*folder.config["target_modules"])
        kinds = ["nowhere" if k == kind else k for k in folder.config["target_modules"]]
        changed = _with_tensors(folder, {kind: None, "nowhere": folder.tensors[kind]})
        return _with_config(changed, target_modules=kinds)
    bases = {*folder.linears, *folder.embeddings}
    modules = sorted(m for m in bases if any(name.startswith(f"{PREFIX}{m}.") for name in folder.tensors))
    module = d.one_of(*modules)
    old, new = f"{PREFIX}{module}.", f"{PREFIX}{d.one_of('nowhere', module + 'x', 'x.' + module, 'a' * 300)}."
    tensors = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in folder.tensors.items()}
    return _with_config(replace(folder, tensors=tensors), target_modules=..., layers_to_transform=...)


def index_out_of_range(d: Draws, folder: Folder) -> Folder:
    names = [name for name in folder.tensors if name.endswith("indices")]
    if not names:
        return key_unknown(d, folder)
    name = d.one_of(*names)
    dtype = folder.tensors[name].dtype
    if dtype.is_floating_point:
        return _with_value(d, folder, name, d.one_of(-1.0, 1e4))
    limits = torch.iinfo(dtype)
    return _with_value(d, folder, name, d.one_of(limits.max, limits.min if limits.min < 0 else limits.max))


CERTAIN: tuple[Break, ...] = (
    *(key_unknown, nan_text, target_without_tensors, layer_without_tensors, module_unknown, index_out_of_range),
)
"""What these make is always to be refused."""
