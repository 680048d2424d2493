"""Adapters that older versions stored are still read, and as little believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from overtone.adapters import ParsedAdapter
from overtone.adapters.canonical import decode
from overtone.errors import InvalidAdapter
from overtone.kernels import Delta, SparseCore
from support.adapters import BASE, SHAPES, files_of, make_loca_folder, parse
from support.canonical import InMemory, assert_same, facts_in
from support.older_blobs import encode_format_2
from support.terms import KINDS, RandomTerms

Q = "model.layers.0.self_attn.q_proj"
NOTHING_SHARED = InMemory({})


def test_format_1_is_still_read(tmp_path: Path) -> None:
    parsed = parse(*files_of(make_loca_folder(tmp_path / "a", {Q: SHAPES[Q]}, n=9, seed=1)), BASE)
    core = parsed.deltas[Q].terms[0].core
    assert isinstance(core, SparseCore)
    tensors = {f"{Q}.rows": core.rows, f"{Q}.cols": core.cols, f"{Q}.values": core.values}
    module = {"shape": [24, 24], "analysis": "dct", "synthesis": "dct"}
    facts = {"format": 1, "family": "loca", "base_fingerprint": "", "modules": {Q: module}}
    stored = decode(save(tensors, {"overtone": json.dumps(facts)}), BASE, NOTHING_SHARED)
    assert_same(stored.deltas[Q], parsed.deltas[Q])


def test_format_2_is_still_read() -> None:
    """Every kind of term, several on a module, one core on two modules."""
    deltas = {}
    for i, (module, shape) in enumerate(SHAPES.items()):
        terms = RandomTerms(shape, i)
        deltas[module] = Delta(tuple(terms.make(kind) for kind in KINDS), shape)
    first, second = (m for m, shape in SHAPES.items() if shape == (24, 24))
    deltas[second] = Delta((*deltas[second].terms, deltas[first].terms[-1]), (24, 24))
    blob, shared = encode_format_2(ParsedAdapter("many", deltas, "base", BASE.fingerprint, 7, ()))
    stored = decode(blob, BASE, InMemory(shared))
    assert stored.family == "many"
    assert stored.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert_same(stored.deltas[name], delta)
    assert stored.deltas[second].terms[-1].core is stored.deltas[first].terms[-1].core


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "row out of range": lambda t: t[f"{Q}.0.rows"].__setitem__(-1, 24),
    "negative column": lambda t: t[f"{Q}.0.cols"].__setitem__(0, -1),
    "not sorted": lambda t: t.update({f"{Q}.0.rows": t[f"{Q}.0.rows"].flip(0)}),
    "not finite": lambda t: t[f"{Q}.0.values"].__setitem__(0, torch.nan),
    "wide rows": lambda t: t.update({f"{Q}.0.rows": t[f"{Q}.0.rows"].long()}),
    "two lengths": lambda t: t.update({f"{Q}.0.cols": t[f"{Q}.0.cols"][1:].clone()}),
    "a tensor gone": lambda t: t.pop(f"{Q}.0.values"),
    "a tensor more": lambda t: t.update({"x": torch.zeros(1)}),
    "empty": lambda t: t.update({k: v[:0].clone() for k, v in t.items()}),
}


def stored_parts(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    blob, _ = encode_format_2(parse(*files_of(make_loca_folder(tmp_path / "a", {Q: SHAPES[Q]}, n=9, seed=1)), BASE))
    return load(blob), facts_in(blob)


@pytest.mark.parametrize("row", CHANGES)
def test_tensors_are_checked_again(tmp_path: Path, row: str) -> None:
    tensors, facts = stored_parts(tmp_path)
    CHANGES[row](tensors)
    with pytest.raises(InvalidAdapter):
        decode(save(tensors, {"overtone": json.dumps(facts)}), BASE, NOTHING_SHARED)


@pytest.mark.parametrize(
    "change",
    [{"format": 3}, {"modules": []}, {"modules": {Q: {}}}, {"modules": {Q: None}}, {"base_fingerprint": "other"}],
)
def test_facts_are_checked_again(tmp_path: Path, change: dict[str, object]) -> None:
    tensors, facts = stored_parts(tmp_path)
    for text in (json.dumps(facts | change), "[]", "{", "[" * 10_000):
        with pytest.raises(InvalidAdapter):
            decode(save(tensors, {"overtone": text}), BASE, NOTHING_SHARED)
    with pytest.raises(InvalidAdapter):
        decode(save(tensors), BASE, NOTHING_SHARED)
