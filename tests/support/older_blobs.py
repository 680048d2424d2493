"""What format 2 wrote: one file of facts, numbers and locations, but for patterns and matrices that many adapters share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from overtone.adapters import ParsedAdapter
from overtone.adapters.resident import matrices_of
from overtone.adapters.safetensors_writer import PREFIX, pack
from overtone.adapters.terms import facts_of
from overtone.kernels import SparseCore, Term, numbers_of


def encode_format_2(adapter: ParsedAdapter) -> tuple[bytes, dict[str, bytes]]:
    """The blob, and by digest what it shares."""
    tensors: dict[str, torch.Tensor] = {}
    sharing: dict[str, bytes] = {}
    modules: dict[str, Any] = {}
    owned: dict[int, str] = {}
    for name, delta in adapter.deltas.items():
        terms = []
        for i, term in enumerate(delta.terms):
            numbers = _numbers(term)
            same = {part: owned[id(t)] for part, t in numbers.items() if id(t) in owned}
            for part, tensor in numbers.items():
                if part not in same:
                    owned[id(tensor)] = f"{name}.{i}.{part}"
                    tensors[f"{name}.{i}.{part}"] = tensor
            terms.append(_facts(term) | ({"same": same} if same else {}))
            sharing |= {key.removeprefix(PREFIX): pack(found) for key, found in _shared(term).items()}
        modules[name] = {"shape": list(delta.shape), "terms": terms}
    facts = {
        "format": 2,
        "family": adapter.family,
        "base_fingerprint": adapter.base_fingerprint,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "parameter_count": adapter.parameter_count,
        "modules": modules,
    }
    return pack(tensors, {"overtone": json.dumps(facts, sort_keys=True, separators=(",", ":"))}), sharing


def _numbers(term: Term) -> dict[str, torch.Tensor]:
    numbers = numbers_of(term.core)
    if isinstance(term.core, SparseCore) and not term.core.pattern.key:
        numbers |= {"rows": term.core.rows, "cols": term.core.cols}
    return numbers | ({} if term.gain is None else {"gain": term.gain})


def _facts(term: Term) -> dict[str, Any]:
    facts = facts_of(term)
    if facts.pop("keyed", False):
        assert isinstance(term.core, SparseCore)
        facts["pattern"] = term.core.pattern.key
    return facts


def _shared(term: Term) -> Mapping[str, dict[str, torch.Tensor]]:
    found = {m.key: {"matrix": m.matrix} for m in matrices_of(term) if m.key.startswith(PREFIX)}
    if isinstance(term.core, SparseCore) and term.core.pattern.key:
        found[term.core.pattern.key] = {"rows": term.core.rows, "cols": term.core.cols}
    return found
