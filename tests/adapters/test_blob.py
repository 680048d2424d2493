"""The canonical form: the same bytes for the same adapter, and nothing believed when it is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from overtone.adapters import BaseDescription, ParsedAdapter
from overtone.adapters.blob import Encoded, StoredAdapter, decode, encode
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import Delta, SharedMatrix, SparseCore, SparsePattern
from support.adapters import BASE, SHAPES, files_of, make_loca_folder, parse
from support.terms import KINDS, RandomTerms

Q = "model.layers.0.self_attn.q_proj"
PROGRAM = """
import sys
from pathlib import Path
from overtone.adapters import AdapterFiles, BaseDescription, ParserContext, parse_adapter
from overtone.adapters.blob import encode
shapes = {k: tuple(v) for k, v in __import__("json").loads(sys.argv[2]).items()}
files = [(Path(sys.argv[1]) / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")]
context = ParserContext(BaseDescription("example/small", "f" * 64, shapes))
print(encode(parse_adapter(AdapterFiles(*files), context)).digest)
"""


class Sharing:
    """Shared tensors from memory, as the store finds them on disk."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded

    def matrix(self, key: str, rows: int, digest: str = "") -> SharedMatrix:
        return SharedMatrix(key, self._encoded.shared[key.removeprefix("sha256:")]["matrix"])

    def pattern(self, key: str, shape: tuple[int, int]) -> SparsePattern:
        parts = self._encoded.shared[key.removeprefix("sha256:")]
        return SparsePattern(parts["rows"], parts["cols"], shape, key)


NOTHING_SHARED = Sharing(Encoded(b"", {}))


def whole(encoded: Encoded, base: BaseDescription = BASE) -> StoredAdapter:
    return decode(encoded.blob, base, Sharing(encoded))


def assert_same(got: object, wanted: object) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    elif is_dataclass(wanted):
        assert type(got) is type(wanted)
        for field in fields(wanted):
            assert_same(getattr(got, field.name), getattr(wanted, field.name))
    elif isinstance(wanted, tuple):
        assert isinstance(got, tuple)
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    else:
        assert got == wanted


def test_round_trip() -> None:
    """Every kind of term, several on a module, one core on two modules."""
    deltas = {}
    for i, (module, shape) in enumerate(SHAPES.items()):
        terms = RandomTerms(shape, i)
        deltas[module] = Delta(tuple(terms.make(kind) for kind in KINDS), shape)
    first, second = (m for m, shape in SHAPES.items() if shape == (24, 24))
    deltas[second] = Delta((*deltas[second].terms, deltas[first].terms[-1]), (24, 24))
    adapter = ParsedAdapter("many", deltas, "base", BASE.fingerprint, 7, ())
    encoded = encode(adapter)
    stored = whole(encoded)
    assert stored.family == "many"
    assert stored.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert_same(stored.deltas[name], delta)
    once = len(encode(replace(adapter, deltas={first: deltas[first]})).blob)
    assert stored.deltas[second].terms[-1].core is stored.deltas[first].terms[-1].core
    assert len(encoded.shared) >= 6
    assert once < len(encoded.blob)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_checked_when_read(kind: str) -> None:
    shape = SHAPES[Q]
    adapter = ParsedAdapter("one", {Q: Delta((RandomTerms(shape, 1).make(kind),), shape)}, "", "", 1, ())
    encoded = encode(adapter)
    facts = facts_in(encoded.blob)
    tensors = load(encoded.blob)
    for name in tensors:
        if not tensors[name].is_floating_point():
            continue
        for bad in (tensors[name] * torch.nan, tensors[name][:1].clone(), tensors[name].to(torch.float64)):
            broken = save({**tensors, name: bad}, {"overtone": json.dumps(facts)})
            with pytest.raises(InvalidAdapter):
                decode(broken, BASE, Sharing(encoded))
    for other in (replace(BASE, modules={Q: (shape[0] + 4, shape[1])}), replace(BASE, modules={Q: (shape[0], 28)})):
        with pytest.raises(BaseModelMismatch):
            whole(encoded, other)
        renamed = json.loads(json.dumps(facts))
        renamed["modules"][Q]["shape"] = list(other.modules[Q])
        if kind not in ("dense", "vector", "weight", "modulated", "modulated_transposed"):  # not all know both sizes
            with pytest.raises(InvalidAdapter):
                decode(save(tensors, {"overtone": json.dumps(renamed)}), other, Sharing(encoded))


def test_format_1_is_still_read(tmp_path: Path) -> None:
    parsed = parse(*files_of(make_loca_folder(tmp_path / "a", {Q: SHAPES[Q]}, n=9, seed=1)), BASE)
    core = parsed.deltas[Q].terms[0].core
    assert isinstance(core, SparseCore)
    tensors = {f"{Q}.rows": core.rows, f"{Q}.cols": core.cols, f"{Q}.values": core.values}
    module = {"shape": [24, 24], "analysis": "dct", "synthesis": "dct"}
    facts = {"format": 1, "family": "loca", "base_fingerprint": "", "modules": {Q: module}}
    stored = decode(save(tensors, {"overtone": json.dumps(facts)}), BASE, NOTHING_SHARED)
    assert_same(stored.deltas[Q], parsed.deltas[Q])


def facts_in(blob: bytes) -> dict[str, Any]:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert list(header["__metadata__"]) == ["overtone"]
    facts: dict[str, Any] = json.loads(header["__metadata__"]["overtone"])
    return facts


def test_equal_adapters_have_one_digest(tmp_path: Path) -> None:
    """In another process with another hash seed, and whatever the order and the precision of what was uploaded."""
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1, float_indices=False)
    digest = encode(parse(*files_of(folder), BASE)).digest
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(SHAPES)]
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == digest
    config, weights = files_of(folder)
    order = torch.randperm(9)
    shuffled = {name: tensor[..., order].double().to(tensor.dtype) for name, tensor in load(weights).items()}
    wide = {n: t.long() if n.endswith("indices") else t.double() for n, t in shuffled.items()}
    same = parse(config, save(dict(reversed(wide.items())), {"made": "elsewhere"}), BASE)
    assert encode(same).digest == digest


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
    blob = encode(parse(*files_of(make_loca_folder(tmp_path / "a", {Q: SHAPES[Q]}, n=9, seed=1)), BASE)).blob
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


def test_another_base_is_refused(tmp_path: Path) -> None:
    parsed = parse(*files_of(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1)), BASE)
    for modules in ({}, {**SHAPES, Q: (24, 25)}):
        with pytest.raises(BaseModelMismatch, match=Q if modules else "layers"):
            whole(encode(parsed), replace(BASE, modules=modules))
    recorded = replace(parsed, base_fingerprint=BASE.fingerprint)
    whole(encode(recorded))
    with pytest.raises(BaseModelMismatch):
        whole(encode(recorded), replace(BASE, fingerprint="0" * 64))
