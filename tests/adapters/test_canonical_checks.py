"""Nothing is believed of a stored adapter: whatever is changed in its files is refused, or is the adapter that they say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overtone.adapters import ParsedAdapter
from overtone.adapters.canonical import Sparse, decode, encode
from overtone.adapters.canonical.file import read_file, write_facts
from overtone.adapters.safetensors_writer import Part
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import Delta
from support.adapters import BASE, SHAPES, files_of, make_loca_folder, parse
from support.canonical import InMemory, Parts, taken_apart, whole, with_array
from support.terms import KINDS, RandomTerms

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SIZES_UNKNOWN = ("dense", "vector", "weight", "modulated", "modulated_transposed")
"""Kinds of terms that do not know both sizes of their layer."""


@pytest.fixture
def loca(tmp_path: Path) -> Parts:
    """Two modules of 9 coefficients, (24, 24) and (24, 40)."""
    modules = {name: SHAPES[name] for name in (Q, DOWN)}
    return taken_apart(encode(parse(*files_of(make_loca_folder(tmp_path / "a", modules, n=9, seed=1)))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_checked(kind: str) -> None:
    shape = SHAPES[Q]
    encoded = encode(ParsedAdapter("one", {Q: Delta((RandomTerms(shape, 1).make(kind),), shape)}, "", "", 1, ()))
    parts = taken_apart(encoded)
    assert parts.decode().deltas.keys() == {Q}
    for name, part in parts.numbers.items():
        nan = part.array.copy()
        nan[-1] = -1 if part.dtype == "BF16" else np.nan  # as an int16, -1 is a NaN of bfloat16
        wide = Part("I32", part.shape, np.zeros(part.shape, np.int32))
        for bad in (with_array(part, nan), with_array(part, part.array[:-1]), wide):
            with pytest.raises(InvalidAdapter):
                replace(parts, numbers={**parts.numbers, name: bad}).decode()
    for other in (replace(BASE, modules={Q: (shape[0] + 4, shape[1])}), replace(BASE, modules={Q: (shape[0], 28)})):
        with pytest.raises(BaseModelMismatch):
            whole(encoded, other)
        renamed = copy.deepcopy(parts)
        renamed.layout["modules"][Q]["shape"] = list(other.modules[Q])
        if kind not in SIZES_UNKNOWN:
            with pytest.raises(InvalidAdapter):
                renamed.decode(other)


PLACES: Mapping[str, Callable[[np.ndarray, np.ndarray], object]] = {
    "a row out of range": lambda rows, cols: rows.__setitem__(8, 24),
    "a column out of range": lambda rows, cols: cols.__setitem__(-1, 24),
    "a column in range of another module only": lambda rows, cols: cols.__setitem__(slice(9, 18), range(20, 29)),
    "not sorted": lambda rows, cols: rows.__setitem__(slice(0, 9), rows[8::-1].copy()),
    "twice": lambda rows, cols: (rows.__setitem__(1, rows[0]), cols.__setitem__(1, cols[0])),
}


@pytest.mark.parametrize("change", PLACES)
def test_locations_are_checked(loca: Parts, change: str) -> None:
    loca.decode()
    PLACES[change](loca.places["rows"].array, loca.places["cols"].array)
    with pytest.raises(InvalidAdapter, match="locations"):
        loca.decode()


def test_locations_are_those_of_the_layout(loca: Parts) -> None:
    one, other = loca.places["rows"], loca.places["cols"]
    for places in (
        {"rows": one},
        {"rows": one, "cols": with_array(other, other.array[1:])},
        {"rows": with_array(one, one.array[1:]), "cols": with_array(other, other.array[1:])},
        {name: with_array(part, part.array.astype(np.int32), "I32") for name, part in loca.places.items()},
        {"rows": one, "cols": other, "more": Part("U16", (0,), np.zeros(0, np.uint16))},
    ):
        with pytest.raises(InvalidAdapter):
            replace(loca, places=places).decode()
    with pytest.raises(InvalidAdapter):
        replace(loca, facts={name: value for name, value in loca.facts.items() if name != "places"}).decode()


def term_with(change: Mapping[str, Any]) -> Callable[[Parts], object]:
    return lambda parts: parts.terms[-1].update(change)


LAYOUTS: Mapping[str, Callable[[Parts], object]] = {
    "another format": lambda p: p.layout.update(format=4),
    "no modules": lambda p: p.layout.update(modules={}),
    "a list of modules": lambda p: p.layout.update(modules=[]),
    "a module without facts": lambda p: p.layout["modules"].update({Q: None}),
    "a module without terms": lambda p: p.layout["modules"][Q].update(terms=[]),
    "a module gone": lambda p: p.layout["modules"].pop(Q),
    "an unknown core": term_with({"core": "x"}),
    "another core": term_with({"core": "diagonal"}),
    "a gain that is not there": term_with({"gain": True}),
    "an unknown frame": term_with({"analysis": {"kind": "x"}}),
    "a frame of another size": term_with({"analysis": {"kind": "dft"}}),
    "a frame with blocks": term_with({"analysis": {"kind": "dct", "block": 4}}),
    "a core of another size": term_with({"shape": [24, 25]}),
    "a core of no size": term_with({"shape": [24]}),
    "a core without a size": term_with({"shape": [0, 24]}),
    "a key for one of two": term_with({"keyed": True}),
    "a gap in the locations": term_with({"pattern": [10, 9]}),
    "locations that overlap": term_with({"pattern": [8, 9]}),
    "more locations": term_with({"pattern": [9, 10]}),
    "fewer locations": term_with({"pattern": [9, 8]}),
    "locations before the first": term_with({"pattern": [-1, 9]}),
    "an offset that is no number": term_with({"pattern": [True, 9]}),
    "no pattern": lambda p: p.terms[-1].pop("pattern"),
    "no numbers": term_with({"parts": {}}),
    "an unknown vector": term_with({"parts": {"values": ["float64", 9, [9]]}}),
    "another vector": term_with({"parts": {"values": ["float16", 0, [9]]}}),
    "numbers that overlap": term_with({"parts": {"values": ["float32", 8, [9]]}}),
    "fewer numbers": term_with({"parts": {"values": ["float32", 9, [8]]}}),
    "numbers of a matrix": term_with({"parts": {"values": ["float32", 9, [3, 3]]}}),
    "a huge number of numbers": term_with({"parts": {"values": ["float32", 9, [2**62]]}}),
    "a part more": lambda p: p.terms[-1]["parts"].update(gain=["float32", 9, [9]]),
    "another base": lambda p: p.layout.update(base_fingerprint="other"),
}


@pytest.mark.parametrize("change", LAYOUTS)
def test_layouts_are_checked(loca: Parts, change: str) -> None:
    LAYOUTS[change](loca)
    if change == "a key for one of two":
        one, other = (loca.decode().deltas[name].terms[0].core for name in (Q, DOWN))
        assert {bool(core.pattern.key) for core in (one, other)} == {True, False}  # type: ignore[union-attr]
        return
    with pytest.raises(InvalidAdapter):
        loca.decode()


@pytest.mark.parametrize(
    "facts", [{"format": 4}, {"layout": "../../x"}, {"layout": 7}, {"places": None}, {"places": "A" * 64}], ids=str
)
def test_facts_are_checked(loca: Parts, facts: dict[str, object]) -> None:
    layout = write_facts(loca.layout, {})
    shared = InMemory({**loca.shared, "../../x": layout, "A" * 64: loca.shared[loca.facts["places"]]})
    with pytest.raises(InvalidAdapter):
        decode(write_facts({**loca.facts, **facts}, loca.numbers), BASE, shared)


def test_files_are_checked(loca: Parts) -> None:
    blob = write_facts(loca.facts, loca.numbers)
    shared = InMemory(loca.shared)
    decode(blob, BASE, shared)
    header = int.from_bytes(blob[:8], "little")
    texts = (
        "[]",
        "{}",
        "{",
        "[" * 10_000,
        '{"__metadata__":{"overtone":"["}}',
        '{"__metadata__":{"overtone":"[]"}}',
        "7",
    )
    longer = [len(text).to_bytes(8, "little") + text.encode() for text in (t + " " * (-len(t) % 8) for t in texts)]
    for bad in (b"", blob[:7], blob[: 8 + header - 1], blob[:-1], blob + b"\0" * 4, b"\xff" * 64, *longer):
        with pytest.raises(InvalidAdapter):
            decode(bad, BASE, shared)
    for entry in (
        {"data_offsets": [0, 73]},
        {"data_offsets": [4, 76]},
        {"shape": [17]},
        {"shape": [2, 9]},
        {"shape": [18.0]},
        {"dtype": "F64"},
        {"dtype": None},
    ):
        text = json.loads(blob[8 : 8 + header])
        text["float32"].update(entry)
        changed = json.dumps(text).encode()
        changed += b" " * (-len(changed) % 8)
        with pytest.raises(InvalidAdapter):
            decode(len(changed).to_bytes(8, "little") + changed + blob[8 + header :], BASE, shared)


def test_a_file_that_is_no_vectors_has_none() -> None:
    blob = write_facts({}, {"b": Part("F16", (1,), np.zeros(1, np.float16))})
    assert read_file(blob).vectors()["b"].dtype == "F16"
    odd = json.dumps(
        {
            "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        }
    )
    odd += " " * (-len(odd) % 8)
    with pytest.raises(InvalidAdapter):
        read_file(len(odd).to_bytes(8, "little") + odd.encode() + bytes(6)).vectors()


def test_memory_that_may_be_written_to_is_not_copied(loca: Parts) -> None:
    blob = write_facts(loca.facts, loca.numbers)
    for source in (bytearray(blob), memoryview(bytearray(blob)), blob):
        stored = decode(source, BASE, InMemory(loca.shared))
        assert isinstance(stored.contents, Sparse)
        before = float(stored.contents.values[-1])
        if not isinstance(source, bytes):
            source[-4:] = np.float32(5).tobytes()
        assert float(stored.contents.values[-1]) == (before if isinstance(source, bytes) else 5)


def test_another_base_is_refused(tmp_path: Path) -> None:
    parsed = parse(*files_of(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1)), BASE)
    for modules in ({}, {**SHAPES, Q: (24, 25)}):
        with pytest.raises(BaseModelMismatch, match=Q if modules else "layers"):
            whole(encode(parsed), replace(BASE, modules=modules))
    recorded = replace(parsed, base_fingerprint=BASE.fingerprint)
    whole(encode(recorded))
    with pytest.raises(BaseModelMismatch):
        whole(encode(recorded), replace(BASE, fingerprint="0" * 64))
