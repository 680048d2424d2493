"""Conversions within and between our own families, all of them exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.bridges.draft import Draft
from overtone.adapters.families import ParsedAdapter
from overtone.adapters.families.coefficients import Coefficients
from overtone.adapters.families.loca import decode_locations
from overtone.adapters.families.pica import basis_digest
from overtone.adapters.families.tensors import PREFIX, by_module
from overtone.adapters.files import PEFT_LAYOUT
from overtone.adapters.text import shown
from overtone.errors import UnsupportedAdapter
from overtone.kernels import DCT, Delta, SparseCore

_ORIGIN = ("task_type", "base_model_name_or_path", "base_fingerprint", "revision", "target_modules")


def with_integer_indices(draft: Draft, base: BaseDescription) -> Draft:
    """LoCA's locations as the integers that they stand for on this base. Other precisions might round them elsewhere."""
    if draft.family().name != "loca":
        message = f"only LoCA has locations that are not integers, not {shown(draft.peft_type)}"
        raise UnsupportedAdapter(message, field="peft_type")
    whole: dict[str, torch.Tensor] = {}
    for module, parts in by_module(draft.tensors, ("spectrum", "spectrum_indices")).items():
        values, indices = parts["spectrum"], parts["spectrum_indices"]
        if indices.tensor.is_floating_point():
            indices.check_shape((2, values.tensor.numel()))
            indices.check_floats()
            stored = Coefficients(values.name, values.tensor, indices.name, indices.tensor)
            located = decode_locations(stored, base.shape(module))
            whole[f"{PREFIX}{module}.spectrum_indices"] = located.to(torch.int32)
    return draft.map_tensors("locations are integers now", lambda name, tensor: whole.get(name, tensor))


def to_loca(draft: Draft, parsed: ParsedAdapter) -> Draft:
    """An adapter whose deltas are all sparse in the DCT, as LoCA with integer locations and scale 1: the same delta_W.

    Raises `UnsupportedAdapter` naming the first module that is anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    counts = set()
    for module, delta in parsed.deltas.items():
        core = _dct_core(module, delta)
        tensors[f"{PREFIX}{module}.spectrum"] = core.values
        tensors[f"{PREFIX}{module}.spectrum_indices"] = torch.stack([core.rows, core.cols])
        counts.add(core.nnz)
    config: dict[str, object] = {"peft_type": "LOCA"}
    config |= {key: draft.config[key] for key in _ORIGIN if key in draft.config}
    config |= {"scale": 1.0, "n_frequency": counts.pop() if len(counts) == 1 else None}
    change = f"{parsed.family} is loca now, with integer locations and scale 1"
    return Draft(PEFT_LAYOUT, config, tensors, (*draft.changes, change))


def _dct_core(module: str, delta: Delta) -> SparseCore:
    term = delta.terms[0]
    plain = len(delta.terms) == 1 and term.gain is None
    if plain and term.analysis == DCT and term.synthesis == DCT and isinstance(term.core, SparseCore):
        return term.core
    raise UnsupportedAdapter(f"{shown(module)} is not made of DCT coefficients, so it cannot be LoCA", field=module)


def with_basis(draft: Draft, parsed: ParsedAdapter, *, write: bool, pin: bool) -> Draft:
    """PiCa with the singular vectors that it was parsed with: in the file, or by their digest in the configuration."""
    if parsed.family != "pica":
        message = f"only PiCa needs the base model's singular vectors, not {shown(draft.peft_type)}"
        raise UnsupportedAdapter(message, field="peft_type")
    rank = _rank(parsed.deltas)
    rows = {module: _projection(delta)[:rank] for module, delta in parsed.deltas.items()}
    if write:
        basis = {f"basis.{module}": matrix.to(torch.float32) for module, matrix in rows.items()}
        draft = draft.with_tensors({**draft.tensors, **basis}, f"the singular vectors of {len(rows)} layers are inside")
    if pin:
        digest = basis_digest(rows, rank)
        draft = draft.with_config({**draft.config, "basis_sha256": digest}, f"basis_sha256 is {digest[:12]}...")
    return draft


def _rank(deltas: Mapping[str, Delta]) -> int:
    return next(delta.terms[0].core.shape[1] for delta in deltas.values())


def _projection(delta: Delta) -> torch.Tensor:
    shared = delta.terms[0].analysis.shared
    assert shared is not None
    return shared.matrix
