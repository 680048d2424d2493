"""Nothing in an adapter is ignored: whatever would not be applied is an error of the right class that names it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from overtone.adapters import AdapterStore
from overtone.errors import (
    AdapterIndexOutOfRange,
    BaseModelMismatch,
    InvalidAdapter,
    NonFiniteAdapter,
    TooLarge,
    UnsupportedAdapter,
)
from support.adapters import BASE, files_of, make_loca_folder, make_sdctft_folder, parse

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SPECTRUM, INDICES = f"base_model.model.{Q}.spectrum", f"base_model.model.{Q}.spectrum_indices"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def good(tmp_path: Path) -> tuple[bytes, bytes]:
    modules = {Q: BASE.modules[Q], V: BASE.modules[V]}
    return files_of(make_loca_folder(tmp_path / "good", modules, n=6, seed=1, float_indices=False))


def assert_refused(store: AdapterStore, config: bytes, weights: bytes, kind: type[Exception], *named: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(config, weights, BASE)
    assert type(caught.value) is kind, caught.value
    for part in named:
        assert part in str(caught.value)
    with pytest.raises((InvalidAdapter, TooLarge)):
        upload_files(store, config, weights)
    assert_empty(store)


def upload_files(store: AdapterStore, config: bytes, weights: bytes) -> None:
    with store.begin_upload() as upload:
        upload.write("adapter_config.json", config)
        upload.write("adapter_model.safetensors", weights)
        store.commit_upload(upload, "bad")


def assert_empty(store: AdapterStore) -> None:
    assert store.list(0, "") == ([], "")
    root = store._config.root / "adapters"
    assert not [file for part in ("blobs", "tmp") for file in (root / part).rglob("*") if file.is_file()]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "family": ({"peft_type": "ADALORA"}, UnsupportedAdapter, ("ADALORA", "LOCA")),
    "family in small letters": ({"peft_type": "loca"}, UnsupportedAdapter, ("loca",)),
    "no family": ({"peft_type": None}, InvalidAdapter, ("peft_type",)),
    "unknown key": ({"surprise": 1}, InvalidAdapter, ("surprise",)),
    "another family's key": ({"transform": "dct_orthonormal"}, InvalidAdapter, ("transform",)),
    "bias": ({"bias": "all"}, UnsupportedAdapter, ("bias", "all")),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, UnsupportedAdapter, ("modules_to_save", "lm_head")),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, UnsupportedAdapter, ("fan_in_fan_out",)),
    "exclude_modules": ({"exclude_modules": [1]}, InvalidAdapter, ("exclude_modules",)),
    "layers_pattern": ({"layers_pattern": 1}, InvalidAdapter, ("layers_pattern",)),
    "layers": ({"layers_to_transform": [0]}, InvalidAdapter, ("layers_to_transform", V)),
    "scale is text": ({"scale": "1"}, InvalidAdapter, ("scale",)),
    "scale is a bool": ({"scale": True}, InvalidAdapter, ("scale",)),
    "scale is too large for a float": ({"scale": 10**400}, InvalidAdapter, ("scale",)),
    "scale is null": ({"scale": None}, InvalidAdapter, ("scale",)),
    "scale overflows": ({"scale": 1e300}, NonFiniteAdapter, (SPECTRUM, "float32")),
    "n_frequency": ({"n_frequency": 7}, InvalidAdapter, ("n_frequency", "7", "6")),
    "n_frequency 0": ({"n_frequency": 0}, InvalidAdapter, ("n_frequency",)),
    "target without tensors": ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, InvalidAdapter, ("up_proj",)),
    "tensors without target": ({"target_modules": ["q_proj"]}, InvalidAdapter, (V, "target_modules")),
    "target by a part of a name": ({"target_modules": ["proj"]}, InvalidAdapter, (Q, "target_modules")),
    "targets are numbers": ({"target_modules": [1]}, InvalidAdapter, ("target_modules",)),
    "fingerprint": ({"base_fingerprint": "0" * 64}, BaseModelMismatch, ("0" * 64,)),
    "dct mode": ({"loca_dct_mode": "wavelet"}, InvalidAdapter, ("loca_dct_mode", "wavelet")),
    "dropout": ({"loca_dropout": 2}, InvalidAdapter, ("loca_dropout",)),
}


@pytest.mark.parametrize("row", BAD_CONFIGS)
def test_configurations(store: AdapterStore, good: tuple[bytes, bytes], row: str) -> None:
    changes, kind, named = BAD_CONFIGS[row]
    config = json.dumps({**json.loads(good[0]), **changes}).encode()
    assert_refused(store, config, good[1], kind, *named)


RAW_CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON"),
    "a list": (b"[]", "object"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "UTF-8"),
    "UTF-16": ('{"peft_type": "LOCA"}'.encode("utf-16"), "UTF-8"),
    "a key twice": (b'{"peft_type": "LOCA", "scale": 1, "scale": 2}', "scale"),
    "a key twice, deep": (b'{"peft_type": "LOCA", "auto_mapping": {"a": {"b": 1, "b": 2}}}', "'b'"),
    "NaN": (b'{"peft_type": "LOCA", "scale": NaN}', "NaN"),
    "Infinity": (b'{"peft_type": "LOCA", "scale": -Infinity}', "Infinity"),
    "an overflowing literal": (b'{"peft_type": "LOCA", "scale": 1e999}', "JSON"),
    "a giant integer": (b'{"peft_type": "LOCA", "scale": ' + b"9" * 5000 + b"}", "JSON"),
    "deep nesting": (b'{"peft_type": ' + b"[" * 60_000, "nested"),
    "a lone surrogate": (b'{"peft_type": "LOCA", "revision": "\\ud800"}', "UTF-8"),
    "too large": (b'{"peft_type": "' + b"L" * 70_000 + b'"}', "65536"),
    "a pickle": (pickle.dumps({"peft_type": "LOCA"}), "pickle files are never read"),
}


@pytest.mark.parametrize("row", RAW_CONFIGS)
def test_configuration_bytes(store: AdapterStore, good: tuple[bytes, bytes], row: str) -> None:
    raw, named = RAW_CONFIGS[row]
    assert_refused(store, raw, good[1], InvalidAdapter, "adapter_config.json", named)


def with_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changed = tensors[name].clone()
        changed[index] = value
        return {**tensors, name: changed}

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], type[Exception], tuple[str, ...]]] = {
    "none": (lambda _: {}, InvalidAdapter, ("no tensors",)),
    "row too large": (with_value(INDICES, (0, 3), 24), AdapterIndexOutOfRange, (INDICES, "row", "24", "0..23")),
    "column too large": (with_value(INDICES, (1, 5), 99), AdapterIndexOutOfRange, ("column", "99", "[1, 5]")),
    "negative": (with_value(INDICES, (1, 0), -1), AdapterIndexOutOfRange, ("column", "-1")),
    "float above 1": (
        with_tensor(INDICES, torch.full((2, 6), 1.5)),
        AdapterIndexOutOfRange,
        (INDICES, "1.5", "0..1"),
    ),
    "float below 0": (with_tensor(INDICES, torch.full((2, 6), -1e-6)), AdapterIndexOutOfRange, (INDICES,)),
    "float NaN": (with_tensor(INDICES, torch.full((2, 6), torch.nan)), NonFiniteAdapter, (INDICES, "[0, 0]")),
    "NaN": (with_value(SPECTRUM, (4,), torch.nan), NonFiniteAdapter, (SPECTRUM, "[4]", "nan")),
    "infinity": (with_value(SPECTRUM, (0,), torch.inf), NonFiniteAdapter, (SPECTRUM, "[0]", "inf")),
    "float64 beyond float32": (
        with_tensor(SPECTRUM, torch.full((6,), 1e300, dtype=torch.float64)),
        NonFiniteAdapter,
        (SPECTRUM, "overflows"),
    ),
    "empty": (with_tensor(SPECTRUM, torch.zeros(0)), InvalidAdapter, (SPECTRUM, "n >= 1")),
    "two dimensions": (with_tensor(SPECTRUM, torch.zeros(2, 3)), InvalidAdapter, (SPECTRUM, "(2, 3)")),
    "a scalar": (with_tensor(SPECTRUM, torch.tensor(1.0)), InvalidAdapter, (SPECTRUM, "()")),
    "integer spectrum": (with_tensor(SPECTRUM, torch.ones(6, dtype=torch.int32)), InvalidAdapter, (SPECTRUM, "int32")),
    "indices transposed": (with_tensor(INDICES, torch.zeros(6, 2, dtype=torch.int32)), InvalidAdapter, ("(2, 6)",)),
    "indices too few": (with_tensor(INDICES, torch.zeros(2, 5, dtype=torch.int32)), InvalidAdapter, ("(2, 6)",)),
    "spectrum alone": (without(INDICES), InvalidAdapter, (SPECTRUM, INDICES)),
    "indices alone": (without(SPECTRUM), InvalidAdapter, (SPECTRUM, INDICES)),
    "unknown tensor": (with_tensor("base_model.model.surprise", torch.ones(1)), InvalidAdapter, ("surprise",)),
    "LoRA tensor": (
        with_tensor(f"base_model.model.{Q}.lora_A.weight", torch.ones(2, 24)),
        InvalidAdapter,
        ("lora_A.weight",),
    ),
    "bias": (with_tensor(f"base_model.model.{Q}.bias", torch.ones(24)), InvalidAdapter, (f"{Q}.bias",)),
    "another family's": (with_tensor(f"base_model.model.{Q}.indices", torch.ones(2, 6)), InvalidAdapter, ("indices",)),
    "no prefix": (
        lambda t: {key.removeprefix("base_model."): value for key, value in t.items()},
        InvalidAdapter,
        (f"model.{Q}.spectrum",),
    ),
    "module not in the base": (
        lambda t: {key.replace("layers.0", "layers.9"): value for key, value in t.items()},
        BaseModelMismatch,
        (Q.replace("0", "9"), "nearest", Q),
    ),
    "refused dtype": (with_tensor(SPECTRUM, torch.ones(6, dtype=torch.bool)), InvalidAdapter, (SPECTRUM, "BOOL")),
}


@pytest.mark.parametrize("row", BAD_TENSORS)
def test_tensors(store: AdapterStore, good: tuple[bytes, bytes], row: str) -> None:
    change, kind, named = BAD_TENSORS[row]
    assert_refused(store, good[0], save(change(load(good[1]))), kind, *named)


def test_float_locations_are_loca_only(tmp_path: Path) -> None:
    config, weights = files_of(make_sdctft_folder(tmp_path / "a", {Q: BASE.modules[Q]}, n=6, seed=1))
    tensors = load(weights) | {f"base_model.model.{Q}.indices": torch.rand(2, 6)}
    with pytest.raises(InvalidAdapter, match=r"must hold integers, not torch\.float32"):
        parse(config, save(tensors), BASE)


def test_benign_settings_are_accepted(good: tuple[bytes, bytes]) -> None:
    more = {"peft_version": "0.21.2", "revision": None, "exclude_modules": None, "layers_to_transform": [0, 1]}
    more |= {"learn_location_iter": 100, "loca_dct_mode": "fast", "loca_dropout": 0.1, "modules_to_save": None}
    more |= {"fan_in_fan_out": False, "auto_mapping": None, "base_fingerprint": BASE.fingerprint}
    for targets in (None, "all-linear", "(a+)+$", ["self_attn.q_proj", V]):
        config = json.dumps({**json.loads(good[0]), **more, "target_modules": targets}).encode()
        assert set(parse(config, good[1], BASE).deltas) == {Q, V}


def test_another_base_name_warns_or_is_refused(good: tuple[bytes, bytes]) -> None:
    config = json.dumps({**json.loads(good[0]), "base_model_name_or_path": "other/model"}).encode()
    parsed = parse(config, good[1], BASE)
    assert parsed.base_model_name_or_path == "other/model"
    assert "other/model" in parsed.warnings[0]
    with pytest.raises(BaseModelMismatch, match="other/model"):
        parse(config, good[1], BASE, strict_base=True)
    same = replace(BASE, name="Other/Model/")
    assert parse(config, good[1], same, strict_base=True).warnings == ()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_files_are_parsed_or_refused_by_class(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make = data.draw(st.sampled_from([make_loca_folder, make_sdctft_folder]))
    files = [
        bytearray(f)
        for f in files_of(make(tmp_path_factory.getbasetemp() / "mutated", {Q: BASE.modules[Q]}, n=3, seed=1))
    ]
    target = files[data.draw(st.integers(0, 1))]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(target) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if action == "set":
            target[at] = data.draw(st.integers(0, 255))
        elif action == "cut" and len(target) > 1:
            del target[at : at + data.draw(st.integers(1, 30))]
        else:
            target[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not target:
            break
    try:
        parsed = parse(bytes(files[0]), bytes(files[1]), BASE)
    except InvalidAdapter:
        return
    for delta in parsed.deltas.values():
        assert bool(delta.terms[0].core.values.isfinite().all())
        assert int(delta.terms[0].core.rows.max()) < delta.shape[0]
        assert int(delta.terms[0].core.cols.max()) < delta.shape[1]
