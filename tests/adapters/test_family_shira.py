"""SHiRA: PEFT's folders against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load, save_file

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.errors import (
    AdapterIndexOutOfRange,
    BaseModelMismatch,
    InvalidAdapter,
    NonFiniteAdapter,
    UnsupportedAdapter,
)
from overtone.kernels import IDENTITY, SparseCore, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Layers, Q, assert_as_peft, changed, files_in
from support.peft_folders import peft_folder
from support.tiny import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHT, INDICES = f"{PREFIX}{Q}.shira_weight", f"{PREFIX}{Q}.shira_indices"
N = 2 * (96 + 64)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "seeded": {"r": 1, "random_seed": 5, "target_modules": [*TARGETS, "lm_head"]},
    "not from zeros": {"r": 3, "init_weights": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    config = peft.ShiraConfig(**{"target_modules": TARGETS, **CONFIGS[name]})
    parsed = assert_as_peft(peft_folder(tmp_path, model, config), model)
    saved = load(files_in(tmp_path).weights)
    assert parsed.family == "shira"
    assert parsed.parameter_count == sum(t.numel() for n, t in saved.items() if n.endswith("shira_weight"))
    term = parsed.deltas[Q].terms[0]
    assert (term.analysis, term.synthesis) == (IDENTITY, IDENTITY)


def test_own_mask(tmp_path: Path) -> None:
    def band(layer: Any, r: int, **_: object) -> torch.Tensor:
        p, q = layer.weight.shape
        return (torch.arange(p * q) < r * (p + q)).reshape(p, q)

    config = peft.ShiraConfig(r=2, target_modules=TARGETS, mask_type="random")
    config.mask_type, config.mask_fn = "band", band
    model = tiny_model()
    parsed = assert_as_peft(peft_folder(tmp_path, model, config), model)
    core = parsed.deltas[Q].terms[0].core
    assert isinstance(core, SparseCore)
    assert core.rows.tolist() == [i // 64 for i in range(N)]


def test_duplicates_add_as_in_peft(tmp_path: Path) -> None:
    model = Layers({"a": (9, 14)})
    folder = peft_folder(tmp_path, model, peft.ShiraConfig(r=2, target_modules=["a"]))
    files = files_in(folder)
    name = f"{PREFIX}blocks.a.shira_indices"
    indices = load(files.weights)[name]
    indices[:, 10:20] = indices[:, :10]
    save_file(load(files.weights) | {name: indices}, folder / "adapter_model.safetensors")
    core = assert_as_peft(folder, model).deltas["blocks.a"].terms[0].core
    assert isinstance(core, SparseCore)
    assert core.nnz == 2 * (9 + 14) - 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    config = peft.ShiraConfig(r=2, target_modules=TARGETS)
    return files_in(peft_folder(tmp_path_factory.mktemp("shira"), tiny_model(), config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int16, torch.uint8])
def test_indices_of_any_kind(files: AdapterFiles, dtype: torch.dtype) -> None:
    """PEFT saves them as float32 on Windows."""
    context = ParserContext(base_of(tiny_model()))
    other = changed(files, tensors={INDICES: load(files.weights)[INDICES].to(dtype)})
    got, wanted = (reference.dense_delta(parse_adapter(f, context).deltas[Q]) for f in (other, files))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precisions(files: AdapterFiles, dtype: torch.dtype) -> None:
    values = load(files.weights)[WEIGHT].to(dtype)
    context = ParserContext(base_of(tiny_model()))
    stored = parse_adapter(changed(files, tensors={WEIGHT: values}), context)
    widened = parse_adapter(changed(files, tensors={WEIGHT: values.to(torch.float32)}), context)
    assert torch.equal(reference.dense_delta(stored.deltas[Q]), reference.dense_delta(widened.deltas[Q]))


def test_missing_rank_is_peft_s(tmp_path: Path) -> None:
    model = Layers({"a": (64, 65)})
    made = files_in(peft_folder(tmp_path, model, peft.ShiraConfig(target_modules=["a"])))
    bare = changed(made, dict.fromkeys(("r", "mask_type", "random_seed", "init_weights"), ...))
    assert parse_adapter(bare, ParserContext(base_of(model))).parameter_count == 32 * (64 + 65)


def _indices(place: tuple[int, int], value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    indices = torch.stack([torch.arange(N) // 64, torch.arange(N) % 64]).to(dtype)
    indices[place] = value
    return indices


_GOOD = torch.randn(N, generator=torch.Generator().manual_seed(1))
_HUGE = torch.full((N,), 3e38)

BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "r disagrees": ({"r": 3}, {}, InvalidAdapter, f"{PREFIX}model.layers.0.mlp.down_proj.shira_weight"),
    "r too great": ({"r": 64}, {}, InvalidAdapter, "r"),
    "r enormous": ({"r": 10**4000}, {}, InvalidAdapter, "r"),
    "r 0": ({"r": 0}, {}, InvalidAdapter, "r"),
    "r null": ({"r": None}, {}, InvalidAdapter, "r"),
    "mask a number": ({"mask_type": 1}, {}, InvalidAdapter, "mask_type"),
    "seed text": ({"random_seed": "1"}, {}, InvalidAdapter, "random_seed"),
    "init": ({"init_weights": "no"}, {}, InvalidAdapter, "init_weights"),
    "fan in fan out": ({"fan_in_fan_out": True}, {}, UnsupportedAdapter, "fan_in_fan_out"),
    "unknown key": ({"scaling": 1.0}, {}, InvalidAdapter, "scaling"),
    "too few": ({}, {WEIGHT: _GOOD[1:]}, InvalidAdapter, WEIGHT),
    "too many": ({}, {WEIGHT: _GOOD.repeat(2)}, InvalidAdapter, WEIGHT),
    "two dimensions": ({}, {WEIGHT: _GOOD[None]}, InvalidAdapter, WEIGHT),
    "empty": ({}, {WEIGHT: _GOOD[:0], INDICES: _indices((0, 0), 0)[:, :0]}, InvalidAdapter, WEIGHT),
    "integers": ({}, {WEIGHT: torch.arange(N)}, InvalidAdapter, WEIGHT),
    "infinity": ({}, {WEIGHT: 1 / torch.zeros(N)}, NonFiniteAdapter, WEIGHT),
    "duplicates overflow": ({}, {WEIGHT: _HUGE, INDICES: _indices((1, 1), 0)}, NonFiniteAdapter, WEIGHT),
    "row too great": ({}, {INDICES: _indices((0, 5), 96)}, AdapterIndexOutOfRange, INDICES),
    "column too great": ({}, {INDICES: _indices((1, 5), 64)}, AdapterIndexOutOfRange, INDICES),
    "row negative": ({}, {INDICES: _indices((0, 5), -1)}, AdapterIndexOutOfRange, INDICES),
    "column enormous": ({}, {INDICES: _indices((1, 5), 2**62, torch.int64)}, AdapterIndexOutOfRange, INDICES),
    "float too great": ({}, {INDICES: _indices((0, 5), 1e30, torch.float32)}, AdapterIndexOutOfRange, INDICES),
    "float between": ({}, {INDICES: _indices((0, 5), 2.5, torch.float32)}, InvalidAdapter, INDICES),
    "float NaN": ({}, {INDICES: _indices((0, 5), torch.nan, torch.float32)}, NonFiniteAdapter, INDICES),
    "float of half precision": ({}, {INDICES: _indices((0, 5), 2, torch.float16)}, InvalidAdapter, INDICES),
    "indices too few": ({}, {INDICES: _indices((0, 0), 0)[:, 1:]}, InvalidAdapter, INDICES),
    "indices turned": ({}, {INDICES: _indices((0, 0), 0).T}, InvalidAdapter, INDICES),
    "no indices": ({}, {INDICES: None}, InvalidAdapter, WEIGHT),
    "no weight": ({}, {WEIGHT: None}, InvalidAdapter, INDICES),
    "unknown tensor": ({}, {f"{PREFIX}{Q}.shira_mask": _GOOD}, InvalidAdapter, f"{PREFIX}{Q}.shira_mask"),
    "unknown layer": (
        {},
        {f"{PREFIX}model.x.q_proj.shira_weight": _GOOD, f"{PREFIX}model.x.q_proj.shira_indices": _indices((0, 0), 0)},
        BaseModelMismatch,
        "model.x.q_proj",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(files: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(changed(files, config, tensors), ParserContext(base_of(tiny_model())))
    assert (type(raised.value), raised.value.field) == (error, field)
