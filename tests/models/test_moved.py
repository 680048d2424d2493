"""Adapters copied to a device as they are."""

from __future__ import annotations

import torch

from overtone.adapters.resident import make_resident
from overtone.kernels import CsrCore, Delta, PackedDeltas, SparseCore
from overtone.models.device.moved import moved_to
from support.terms import RandomTerms


def test_packed_deltas_whose_terms_live_only_while_they_are_looked_at() -> None:
    shapes = {f"m{i}": (8 + i, 40 - i) for i in range(20)}
    deltas = {name: Delta((RandomTerms(shape, 1).make("sparse"),), shape) for name, shape in shapes.items()}
    packed = make_resident("d", "x", deltas).deltas
    assert isinstance(packed, PackedDeltas)
    moved = moved_to(packed, torch.device("cpu"))
    for name, delta in deltas.items():
        (wanted,), (term,) = delta.terms, moved[name].terms
        assert isinstance(wanted.core, SparseCore)
        assert isinstance(term.core, CsrCore)
        assert term.core.shape == wanted.core.shape
        for part in ("rows", "cols", "values"):
            assert torch.equal(getattr(term.core, part), getattr(wanted.core, part))
