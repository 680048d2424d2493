"""The canonical form of an adapter: one safetensors file whose SHA-256 is the adapter's version.

`<module>.<i>.<part>` are the tensors of the module's i-th term (see `overtone.kernels.Term`): the numbers of its core by
field name, `gain`, and `rows` and `cols` of a sparse core's pattern. What many adapters share (patterns, matrices) is not in
the file but in blobs of its own, named by their content; singular vectors of the base model are in neither. What else must
be known is JSON under one metadata key: with more than one, the order in which the writer puts them would make equal
adapters differ in their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from overtone.adapters import shared
from overtone.adapters.base import BaseDescription
from overtone.adapters.blobs import digest_of
from overtone.adapters.families import ParsedAdapter
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.adapters.terms import SharedTensors, TermReader, facts_of
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import Delta, SparseCore, numbers_of

FORMAT = 2
_METADATA_KEY = "overtone"
_LIMITS = Limits(header_bytes=32 << 20, tensors=200_000)
"""Wider than for uploads: a module may take more tensors here than there, and these files are our own."""


@dataclass(frozen=True)
class Encoded:
    """An adapter's blob, and the tensors of the shared blobs that it refers to, by digest."""

    blob: bytes
    shared: Mapping[str, Mapping[str, torch.Tensor]]

    @property
    def digest(self) -> str:
        return digest_of(self.blob)


@dataclass(frozen=True)
class StoredAdapter:
    """A decoded blob."""

    family: str
    deltas: Mapping[str, Delta]


def encode(adapter: ParsedAdapter) -> Encoded:
    """Equal adapters give equal bytes, in any process."""
    tensors: dict[str, torch.Tensor] = {}
    sharing: dict[str, Mapping[str, torch.Tensor]] = {}
    modules: dict[str, Any] = {}
    owned: dict[int, str] = {}
    for name, delta in adapter.deltas.items():
        terms = []
        for i, term in enumerate(delta.terms):
            numbers = numbers_of(term.core)
            if isinstance(term.core, SparseCore) and not term.core.pattern.key:
                numbers |= {"rows": term.core.rows, "cols": term.core.cols}
            if term.gain is not None:
                numbers["gain"] = term.gain
            # One tensor may serve many modules (PiCa's): it is stored where it first appears.
            same = {part: owned[id(t)] for part, t in numbers.items() if id(t) in owned}
            for part, tensor in numbers.items():
                if part not in same:
                    owned[id(tensor)] = f"{name}.{i}.{part}"
                    tensors[f"{name}.{i}.{part}"] = tensor
            terms.append(facts_of(term) | ({"same": same} if same else {}))
            sharing |= shared.parts_of(term)
        modules[name] = {"shape": list(delta.shape), "terms": terms}
    facts = {
        "format": FORMAT,
        "family": adapter.family,
        "base_fingerprint": adapter.base_fingerprint,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "parameter_count": adapter.parameter_count,
        "modules": modules,
    }
    if adapter.basis:  # which the tensors do not tell, and the digest must
        facts["basis"] = adapter.basis
    blob = shared.pack(tensors, {_METADATA_KEY: json.dumps(facts, sort_keys=True, separators=(",", ":"))})
    return Encoded(blob, sharing)


def decode(blob: bytes, base: BaseDescription, sharing: SharedTensors) -> StoredAdapter:
    """The adapter in a blob, checked anew: nothing read from disk reaches the kernels on trust.

    Raises `InvalidAdapter` if it is malformed and `BaseModelMismatch` if it does not fit `base`; what `sharing` raises.
    """
    file = read_safetensors(blob, "the stored adapter", _LIMITS)
    try:
        facts = json.loads(file.metadata[_METADATA_KEY])
        if facts["format"] == 1:
            facts = _from_format_1(facts)
        if facts["format"] != FORMAT:
            raise InvalidAdapter(f"the stored adapter has format {facts['format']}, not {FORMAT}; upload it again")
        if facts["base_fingerprint"] not in ("", base.fingerprint):
            raise BaseModelMismatch(
                "the stored adapter was checked against another base model than the one served; upload it again",
                field="base_fingerprint",
            )
        reader = TermReader(file.tensors, sharing)
        modules = facts["modules"]
        deltas = {name: _delta(reader, name, modules[name], base) for name in sorted(modules)}
        family = str(facts["family"])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RecursionError) as error:
        raise InvalidAdapter("the stored adapter lacks what its format demands") from error
    if reader.unused():
        raise InvalidAdapter("the stored adapter has tensors that belong to no module")
    return StoredAdapter(family, deltas)


def _delta(reader: TermReader, module: str, facts: Mapping[str, Any], base: BaseDescription) -> Delta:
    shape = base.shape_of_any(module)
    if facts["shape"] != list(shape):
        message = f"{module} is {facts['shape']} in the stored adapter and {list(shape)} in the base model"
        raise BaseModelMismatch(message, field=module)
    return Delta(tuple(reader.term(module, i, term, shape) for i, term in enumerate(facts["terms"])), shape)


def _from_format_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had one sparse core a module, whose tensors were called `<module>.rows`, `.cols` and `.values`."""

    def term(module: str, old: Mapping[str, Any]) -> dict[str, Any]:
        frames = {side: {"kind": old[side]} for side in ("analysis", "synthesis")}
        same = {part: f"{module}.{part}" for part in ("rows", "cols", "values")}
        return {**frames, "core": "sparse", "shape": old["shape"], "gain": False, "same": same}

    modules = {name: {"shape": old["shape"], "terms": [term(name, old)]} for name, old in facts["modules"].items()}
    return {**facts, "format": FORMAT, "modules": modules}
