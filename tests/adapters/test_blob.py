"""The canonical form: the same bytes for the same adapter, and nothing believed when it is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from overtone.adapters import parse_adapter
from overtone.adapters.blob import decode, digest_of, encode
from overtone.errors import BaseModelMismatch, InvalidAdapter
from support.adapters import BASE, SHAPES, files_of, make_loca_folder, make_sdctft_folder

Q = "model.layers.0.self_attn.q_proj"
PROGRAM = """
import sys
from pathlib import Path
from overtone.adapters import BaseDescription, parse_adapter
from overtone.adapters.blob import digest_of, encode
shapes = {k: tuple(v) for k, v in __import__("json").loads(sys.argv[2]).items()}
files = [(Path(sys.argv[1]) / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")]
print(digest_of(encode(parse_adapter(*files, BaseDescription("example/small", "f" * 64, shapes)))))
"""


@pytest.mark.parametrize("make", [make_loca_folder, make_sdctft_folder])
def test_round_trip(tmp_path: Path, make: Callable[..., Path]) -> None:
    parsed = parse_adapter(*files_of(make(tmp_path / "a", SHAPES, n=9, seed=1)), BASE)
    stored = decode(encode(parsed), BASE)
    assert stored.family == parsed.family
    assert stored.deltas.keys() == parsed.deltas.keys()
    for name, delta in parsed.deltas.items():
        got = stored.deltas[name]
        assert (got.analysis, got.synthesis, got.shape) == (delta.analysis, delta.synthesis, delta.shape)
        for part in ("rows", "cols", "values"):
            assert torch.equal(getattr(got.core, part), getattr(delta.core, part))


def test_equal_adapters_have_one_digest(tmp_path: Path) -> None:
    """In another process with another hash seed, and whatever the order and the precision of what was uploaded."""
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1, float_indices=False)
    digest = digest_of(encode(parse_adapter(*files_of(folder), BASE)))
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(SHAPES)]
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == digest
    config, weights = files_of(folder)
    order = torch.randperm(9)
    shuffled = {name: tensor[..., order].double().to(tensor.dtype) for name, tensor in load(weights).items()}
    wide = {n: t.long() if n.endswith("indices") else t.double() for n, t in shuffled.items()}
    same = parse_adapter(config, save(dict(reversed(wide.items())), {"made": "elsewhere"}), BASE)
    assert digest_of(encode(same)) == digest


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "row out of range": lambda t: t[f"{Q}.rows"].__setitem__(-1, 24),
    "negative column": lambda t: t[f"{Q}.cols"].__setitem__(0, -1),
    "not sorted": lambda t: t.update({f"{Q}.rows": t[f"{Q}.rows"].flip(0)}),
    "not finite": lambda t: t[f"{Q}.values"].__setitem__(0, torch.nan),
    "wide rows": lambda t: t.update({f"{Q}.rows": t[f"{Q}.rows"].long()}),
    "two lengths": lambda t: t.update({f"{Q}.cols": t[f"{Q}.cols"][1:].clone()}),
    "a tensor gone": lambda t: t.pop(f"{Q}.values"),
    "a tensor more": lambda t: t.update({"x": torch.zeros(1)}),
    "empty": lambda t: t.update({k: v[:0].clone() for k, v in t.items()}),
}


def stored_parts(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    blob = encode(parse_adapter(*files_of(make_loca_folder(tmp_path / "a", {Q: SHAPES[Q]}, n=9, seed=1)), BASE))
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert list(header["__metadata__"]) == ["overtone"]
    return load(blob), json.loads(header["__metadata__"]["overtone"])


@pytest.mark.parametrize("row", CHANGES)
def test_tensors_are_checked_again(tmp_path: Path, row: str) -> None:
    tensors, facts = stored_parts(tmp_path)
    CHANGES[row](tensors)
    with pytest.raises(InvalidAdapter):
        decode(save(tensors, {"overtone": json.dumps(facts)}), BASE)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"modules": []}, {"modules": {Q: {}}}, {"modules": {Q: None}}, {"base_fingerprint": "other"}],
)
def test_facts_are_checked_again(tmp_path: Path, change: dict[str, object]) -> None:
    tensors, facts = stored_parts(tmp_path)
    for text in (json.dumps(facts | change), "[]", "{", "[" * 10_000):
        with pytest.raises(InvalidAdapter):
            decode(save(tensors, {"overtone": text}), BASE)
    with pytest.raises(InvalidAdapter):
        decode(save(tensors), BASE)


def test_another_base_is_refused(tmp_path: Path) -> None:
    parsed = parse_adapter(*files_of(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1)), BASE)
    for modules in ({}, {**SHAPES, Q: (24, 25)}):
        with pytest.raises(BaseModelMismatch, match=Q if modules else "layers"):
            decode(encode(parsed), replace(BASE, modules=modules))
    recorded = replace(parsed, base_fingerprint=BASE.fingerprint)
    decode(encode(recorded), BASE)
    with pytest.raises(BaseModelMismatch):
        decode(encode(recorded), replace(BASE, fingerprint="0" * 64))
