"""For any bytes: the tensors that are there, or `InvalidAdapter`. Nothing else, nothing costly."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.errors import InvalidAdapter


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, dtype=torch.int32)}, {"k": "v"})

BAD = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (GOOD[:7], "7 bytes"),
    "length only": (struct.pack("<Q", 0), "begin with"),
    "header bomb": (struct.pack("<Q", 1 << 62) + b"{", "claims"),
    "header past the end": (struct.pack("<Q", 5000) + b"{}", "ends after"),
    "not an object": (raw(b"[1, 2]"), "begin with"),
    "bad JSON": (raw(b'{"a": '), "JSON"),
    "bad UTF-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "a tensor twice": (raw(b'{"a": {}, "a": {}}'), "twice"),
    "deep nesting": (raw(b'{"a": ' + b"[" * 500_000), "nested"),
    "truncated": (GOOD[:-1], "safetensors"),
    "trailing garbage": (GOOD + b"\0", "safetensors"),
    "overlap": (raw({"a": entry(), "b": entry()}, bytes(4)), "safetensors"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)), "safetensors"),
    "size and shape disagree": (raw({"a": entry(shape=(2,))}, bytes(4)), "needs 8 bytes"),
    "shape overflow": (raw({"a": entry(shape=(2**63, 2**63, 0), offsets=(0, 0))}), "impossible shape"),
    "negative shape": (raw({"a": entry(shape=(-1,))}, bytes(4)), "impossible shape"),
    "boolean shape": (raw({"a": entry(shape=(True,))}, bytes(4)), "impossible shape"),
    "many dimensions": (raw({"a": entry(shape=[1] * 70)}, bytes(4)), "impossible shape"),
    "dtype": (raw({"a": entry("F4")}, bytes(4)), "F4"),
    "dtype is a list": (raw({"a": entry([])}, bytes(4)), "dtype"),
    "offsets backwards": (raw({"a": entry(offsets=(4, 0))}, bytes(4)), "data_offsets"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(4)), "data_offsets"),
    "an extra field": (raw({"a": {**entry(), "x": 1}}, bytes(4)), "only"),
    "entry is null": (raw({"a": None}), "only"),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "too many tensors": (raw({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(10_001)}), "10001 tensors"),
    "pickle": (pickle.dumps({"a": torch.zeros(2)}), "pickle files are never read"),
    "torch.save": (b"PK\x03\x04" + bytes(100), "pickle files are never read"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_files(row: str) -> None:
    data, named = BAD[row]
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors") as caught:
        read_safetensors(data)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_good_file() -> None:
    file = read_safetensors(GOOD)
    assert torch.equal(file.tensors["a"], torch.arange(6.0).view(2, 3))
    assert file.tensors["b"].shape == (0,)
    assert file.metadata == {"k": "v"}


def test_a_header_length_that_looks_like_a_pickle() -> None:
    """0x80 opens a pickle, and every 32nd safetensors file as well."""
    padding = next(n for n in range(1000) if len(raw({"a": entry(), "__metadata__": {"k": "x" * n}})) == 8 + 0x280)
    data = raw({"a": entry(), "__metadata__": {"k": "x" * padding}}, bytes(4))
    assert data[:2] == b"\x80\x02"
    assert read_safetensors(data).tensors["a"].tolist() == [0.0]


def test_limits_are_the_callers() -> None:
    with pytest.raises(InvalidAdapter, match="more than the 1 allowed"):
        read_safetensors(GOOD, limits=Limits(tensors=1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F64", "U8"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | json_values, max_size=4)
files = (
    st.binary(max_size=200)
    | st.builds(raw, headers, st.binary(max_size=40))
    | st.builds(raw, st.binary(max_size=60).map(lambda b: b"{" + b), st.binary(max_size=10))
    | st.builds(lambda at, b: GOOD[:at] + b + GOOD[at + 1 :], st.integers(0, len(GOOD)), st.binary(max_size=3))
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(files)
def test_any_bytes(data: bytes) -> None:
    try:
        file = read_safetensors(data)
    except InvalidAdapter:
        return
    assert sum(t.numel() * t.element_size() for t in file.tensors.values()) <= len(data)
