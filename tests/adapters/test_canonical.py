"""The canonical form: the same bytes for the same adapter, and the same adapter from the bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load, load_file, save

from overtone.adapters import ParsedAdapter
from overtone.adapters.canonical import Encoded, Sparse, encode
from overtone.adapters.canonical.file import write_facts
from overtone.adapters.safetensors_writer import Part, pack
from overtone.kernels import DCT, Delta, SparseCore, Term, sparse_core
from overtone.kernels.reference import core_dense
from support.adapters import BASE, SHAPES, files_of, make_loca_folder, make_sdctft_folder, parse
from support.canonical import assert_same, facts_in, taken_apart, whole
from support.terms import KINDS, RandomTerms

Q = "model.layers.0.self_attn.q_proj"
GOLDEN = "d181693defb5c607e186f0c52f73457b7f1af3d28379ddc4fae236c78d4a30e2"
PROGRAM = """
import sys
from pathlib import Path
from overtone.adapters import AdapterFiles, BaseDescription, ParserContext, parse_adapter
from overtone.adapters.canonical import encode
shapes = {k: tuple(v) for k, v in __import__("json").loads(sys.argv[2]).items()}
files = [(Path(sys.argv[1]) / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")]
context = ParserContext(BaseDescription("example/small", "f" * 64, shapes))
print(encode(parse_adapter(AdapterFiles(*files), context)).digest)
"""


def adapter_of(deltas: dict[str, Delta]) -> ParsedAdapter:
    return ParsedAdapter("many", deltas, "base", BASE.fingerprint, 7, ())


def place_and_layout(encoded: Encoded) -> tuple[bytes, bytes]:
    facts = facts_in(encoded.blob)
    return encoded.shared[facts["places"]], encoded.shared[facts["layout"]]


def test_round_trip() -> None:
    """Every kind of term, several on a module, one core on two modules."""
    deltas = {}
    for i, (module, shape) in enumerate(SHAPES.items()):
        terms = RandomTerms(shape, i)
        deltas[module] = Delta(tuple(terms.make(kind) for kind in KINDS), shape)
    first, second = (m for m, shape in SHAPES.items() if shape == (24, 24))
    deltas[second] = Delta((*deltas[second].terms, deltas[first].terms[-1]), (24, 24))
    encoded = encode(adapter_of(deltas))
    stored = whole(encoded)
    assert stored.family == "many"
    assert stored.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert_same(stored.deltas[name], delta)
    assert stored.deltas[second].terms[-1].core is stored.deltas[first].terms[-1].core
    assert not isinstance(stored.contents, Sparse)
    assert len(encoded.shared) >= 6
    assert all(hashlib.sha256(encoded.shared[digest]).hexdigest() == digest for digest in encoded.shared)
    alone = encode(adapter_of({first: deltas[first], second: Delta(deltas[first].terms, (24, 24))}))
    assert taken_apart(alone).numbers.keys() == {"float32", "bfloat16"}
    assert len(alone.blob) == len(encode(adapter_of({first: deltas[first]})).blob), "what is the same is stored once"


def test_adapters_of_sparse_cores_are_arrays() -> None:
    """Of every frame that needs no matrix; with equal patterns, and cores that two modules have."""
    for kinds in (("dct", "dft", "sparse", "haar", "db2"), ("shared_pattern",)):
        deltas = {}
        for i, (module, shape) in enumerate(SHAPES.items()):
            deltas[module] = Delta(tuple(RandomTerms(shape, i).make(kind) for kind in kinds), shape)
        first, second = (m for m, shape in SHAPES.items() if shape == (24, 24))
        deltas[second] = Delta((deltas[first].terms[0], *deltas[second].terms), (24, 24))
        stored = whole(encode(adapter_of(deltas)))
        assert isinstance(stored.contents, Sparse)
        assert stored.contents.layout.keyed == (kinds == ("shared_pattern",))
        for name, delta in deltas.items():
            assert_same(stored.deltas[name], delta)
        cores = {name: stored.deltas[name].terms[0].core for name in (first, second)}
        assert cores[first] is not None
        assert stored.deltas[second].terms[0].core.shape == (24, 24)
        packed = stored.contents.packed
        assert list(packed) == sorted(deltas)
        for name, delta in deltas.items():
            for term, wanted in zip(packed[name].terms, delta.terms, strict=True):
                assert isinstance(wanted.core, SparseCore)
                assert_same((term.analysis, term.synthesis), (wanted.analysis, wanted.synthesis))
                assert_same((term.core.rows, term.core.cols), (wanted.core.rows, wanted.core.cols))


def test_equal_patterns_are_stored_once(tmp_path: Path) -> None:
    """Of two modules of one adapter, and of two adapters."""
    blobs = []
    for seed in (1, 2):
        folder = make_sdctft_folder(tmp_path / str(seed), SHAPES, n=9, seed=1)
        config, weights = files_of(folder)
        tensors = load(weights)
        for name, tensor in tensors.items():
            if name.endswith("indices"):
                tensors[name] = torch.stack([torch.arange(9) % 8, torch.arange(9)])
            else:
                tensors[name] = tensor * seed
        blobs.append(encode(parse(config, save(tensors))))
    one, other = blobs
    assert one.digest != other.digest
    assert one.shared == other.shared
    places, _ = place_and_layout(one)
    assert {name: part.tolist() for name, part in safetensors.numpy.load(places).items()} == {
        "rows": sorted(np.arange(9) % 8),
        "cols": [0, 8, 1, 2, 3, 4, 5, 6, 7],
    }


def test_the_layout_knows_neither_numbers_nor_locations(tmp_path: Path) -> None:
    folders = [make_loca_folder(tmp_path / str(seed), SHAPES, n=3, seed=seed, scale=seed) for seed in (4, 5, 6)]
    layouts = {place_and_layout(encode(parse(*files_of(folder))))[1] for folder in folders}
    assert len(layouts) == 1
    more = make_loca_folder(tmp_path / "more", SHAPES, n=4, seed=4)
    assert place_and_layout(encode(parse(*files_of(more))))[1] not in layouts


def test_any_reader_of_safetensors_reads_the_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the very code that docs/store.md shows."""
    parsed = parse(*files_of(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1)))
    encoded = encode(parsed)
    monkeypatch.chdir(tmp_path)
    for digest, blob in (*encoded.shared.items(), (encoded.digest, encoded.blob)):
        Path(f"{digest}.safetensors").write_bytes(blob)
        load_file(f"{digest}.safetensors")
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0].replace("<version>", encoded.digest)
    found: dict[str, np.ndarray] = {}
    exec(code + "        found[name] = core\n", {"found": found})
    assert found.keys() == SHAPES.keys()
    for module, core in found.items():
        wanted = parsed.deltas[module].terms[0].core
        assert np.array_equal(core, core_dense(wanted).numpy())


def test_wide_planes_have_wide_locations() -> None:
    """More than 65,536 rows or columns do not fit 16 bits."""
    base = replace(BASE, modules={"head": (65_537, 4), "q": (65_536, 4)})
    for module, dtype in (("head", "I32"), ("q", "U16")):
        shape = base.modules[module]
        core = sparse_core(torch.tensor([shape[0] - 1, 0]), torch.tensor([3, 1]), torch.ones(2), shape)
        delta = Delta((Term(DCT, core, DCT),), shape)
        encoded = encode(replace(adapter_of({module: delta}), base_fingerprint=""))
        assert taken_apart(encoded).places["rows"].dtype == dtype
        assert_same(whole(encoded, base).deltas[module], delta)


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
    turned = replace(same, deltas=dict(reversed(same.deltas.items())))
    assert encode(turned).digest == digest


def test_the_bytes_never_change() -> None:
    """Of this very adapter: another digest here is another version of every adapter of every store."""
    core = sparse_core(torch.tensor([3, 0, 3]), torch.tensor([1, 2, 1]), torch.tensor([0.5, -2.0, 0.25]), (8, 24))
    module = "model.layers.0.self_attn.v_proj"
    parsed = ParsedAdapter("loca", {module: Delta((Term(DCT, core, DCT),), (8, 24))}, "é", "f" * 64, 3, ())
    encoded = encode(parsed)
    places, layout = place_and_layout(encoded)
    assert places[8:].endswith(bytes([2, 0, 1, 0, 0, 0, 3, 0]))
    assert encoded.blob.endswith(np.array([-2.0, 0.75], "<f4").tobytes())
    assert [len(part) for part in (encoded.blob, layout, places)] == [288, 488, 136]
    assert encoded.digest == GOLDEN


def test_a_matrix_is_made_into_bytes_when_it_is_asked_for() -> None:
    shape = SHAPES[Q]
    term = RandomTerms(shape, 1).make("dense")
    encoded = encode(adapter_of({Q: Delta((term,), shape)}))
    assert "places" not in facts_in(encoded.blob)
    matrix = term.analysis.shared
    assert matrix is not None
    assert encoded.shared[matrix.key.removeprefix("sha256:")] == pack({"matrix": matrix.matrix})
    assert len(encoded.shared) == 2


def test_facts_and_parts_in_any_order_are_the_same_bytes() -> None:
    parts = {name: Part("F32", (2,), np.ones(2, np.float32)) for name in "ab"}
    one = write_facts({"x": 1, "y": 2}, parts)
    assert one == write_facts({"y": 2, "x": 1}, dict(reversed(parts.items())))
