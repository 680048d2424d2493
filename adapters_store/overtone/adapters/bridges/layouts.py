"""The layouts in which the authors' code, or a fork of PEFT, saves LoCA, sDCTFT, DCFT and PiCa: to ours, if there is only
one way to read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from overtone.adapters.bridges.draft import Draft
from overtone.adapters.families.tensors import PREFIX, by_module
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, UnsupportedAdapter

_PARTS: Mapping[str, tuple[str, ...]] = {
    "loca": ("spectrum", "spectrum_indices"),
    "sdctft": ("spectrum", "indices"),
    "dcft": ("lora_A", "lora_B", "lora_C"),
}
_SHARED = "shared_m"
_BASIS = "basis."


def normalised(draft: Draft) -> Draft:
    """Raises `UnsupportedAdapter` for what can be read in two ways, `InvalidAdapter` for names that are no family's."""
    family = draft.family().name
    if family == "pica":
        return _pica(draft)
    parts = _PARTS.get(family)
    if parts is None:
        return draft
    if family == "dcft":
        draft = _prefixed(draft)
    draft = _without_adapter_name(draft, parts)
    if family == "sdctft":
        draft = _upright_indices(draft)
    by_module(draft.tensors, parts)
    return draft


def _prefixed(draft: Draft) -> Draft:
    """The authors of DCFT do not use PEFT, whose prefix is ours as well."""
    if not draft.tensors or any(name.startswith(PREFIX) for name in draft.tensors):
        return draft
    tensors = {PREFIX + name: tensor for name, tensor in draft.tensors.items()}
    return draft.with_tensors(tensors, f"names begin with {PREFIX} now")


def _without_adapter_name(draft: Draft, parts: Collection[str]) -> Draft:
    """<module>.<part>.<adapter's name> -> <module>.<part>."""
    tensors: dict[str, torch.Tensor] = {}
    adapters = set()
    for name, tensor in draft.tensors.items():
        head, _, last = name.rpartition(".")
        named = last not in parts and head.rpartition(".")[2] in parts
        if named:
            adapters.add(last)
        plain = head if named else name
        if plain in tensors or len(adapters) > 1:
            found = ", ".join(shown(adapter) for adapter in sorted(adapters))
            message = f"{shown(name)} is there for more than one adapter ({found}): save each of them by itself"
            raise UnsupportedAdapter(message, field=shown(name))
        tensors[plain] = tensor
    if not adapters:
        return draft
    return draft.with_tensors(tensors, f"the adapter's name {shown(adapters.pop())} is taken out of the tensors' names")


def _upright_indices(draft: Draft) -> Draft:
    """sDCTFT's indices as (n, 2) -> (2, n)."""
    indices = {n: t for n, t in draft.tensors.items() if n.endswith(".indices") and t.ndim == 2}
    lying = [name for name, tensor in indices.items() if tensor.shape[1] == 2 != tensor.shape[0]]
    upright = [name for name, tensor in indices.items() if tensor.shape[0] == 2 != tensor.shape[1]]
    square = [name for name in indices if name not in lying and name not in upright]
    if (lying and upright) or (square and not (lying or upright)):
        name = (upright or square)[0]
        message = f"{shown(name)} is {tuple(indices[name].shape)}: whether its rows are (2, n) or (n, 2) is not clear"
        raise UnsupportedAdapter(message, field=shown(name))
    if not lying:
        return draft
    return draft.map_tensors(
        "indices are (2, n) now, not (n, 2)", lambda name, t: t.T.contiguous() if name in indices else t
    )


def _pica(draft: Draft) -> Draft:
    """shared_m under any name that tells its kind -> the kind. Copies, of which each layer may have one, become one."""
    kinds = draft.config.get("target_modules")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise InvalidAdapter("target_modules must be a list of text", field="target_modules")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in draft.tensors.items():
        kind = name if name in kinds or name.startswith(_BASIS) else _kind(name, kinds)
        if kind in tensors and not _same(tensor, tensors[kind]):
            message = f"{shown(name)} is not the {shown(kind)} of another layer, which PiCa has them share"
            raise UnsupportedAdapter(message, field=shown(name))
        tensors.setdefault(kind, tensor)
    missing = next((kind for kind in kinds if kind not in tensors), None)
    if missing is not None:
        raise InvalidAdapter(f"target_modules names {shown(missing)}, which has no tensor", field="target_modules")
    if tensors.keys() == draft.tensors.keys():
        return draft
    return draft.with_tensors(tensors, "tensors have the names of target_modules now")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _kind(name: str, kinds: list[str]) -> str:
    """Of `<kind>.<adapter>`, `<layer>.shared_m[.<adapter>]` or `[...]shared_m.<kind>[.<adapter>]`."""
    head = name.rpartition(".")[0]
    if head in kinds:
        return head
    before, shared, after = f".{name}.".partition(f".{_SHARED}.")
    if shared:
        first = after.partition(".")[0]
        found = [next((kind for kind in kinds if kind in before), None), first if first in kinds else None]
        known = {kind for kind in found if kind is not None}
        if len(known) == 1:
            return known.pop()
        if known:
            raise UnsupportedAdapter(f"{shown(name)} may be of either {' or '.join(sorted(known))}", field=shown(name))
    raise InvalidAdapter(f"{shown(name)} is not in target_modules", field=shown(name))
