"""C3A: PEFT's folders against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import CirculantCore, block_dft, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Layers, Q, assert_as_peft, changed, files_in
from support.peft_folders import peft_folder
from support.tiny import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
KERNEL = f"{PREFIX}{Q}.c3a_kernel"
FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.c3a_kernel"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"block_size": 16},
    "small": {"block_size": 2, "init_weights": "gaussian"},
    "ones": {"block_size": 1, "init_weights": True},
    "kaiming": {"block_size": 8, "init_weights": "kaiming_uniform", "layers_to_transform": [0]},
    "no name": {"block_size": 4, "init_weights": False},
    "patterns": {
        "block_size": 16,
        "block_size_pattern": {"q_proj": 32, r"layers\.1\.self_attn\.(k|v)_proj": 4, "lm_head": 2},
        "target_modules": [*TARGETS, "lm_head"],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    config = peft.C3AConfig(**{"target_modules": TARGETS, **CONFIGS[name]})
    parsed = assert_as_peft(peft_folder(tmp_path, model, config), model)
    saved = load(files_in(tmp_path).weights)
    assert parsed.family == "c3a"
    assert parsed.parameter_count == sum(t.numel() for n, t in saved.items() if n.endswith("c3a_kernel"))


@pytest.mark.parametrize(("shape", "block"), [((3, 9), 3), ((15, 5), 5), ((7, 7), 7), ((4, 12), 4), ((10, 6), 2)])
def test_odd_and_even_blocks(tmp_path: Path, shape: tuple[int, int], block: int) -> None:
    model = Layers({"a": shape})
    config = peft.C3AConfig(target_modules=["a"], block_size=block)
    term = assert_as_peft(peft_folder(tmp_path, model, config), model).deltas["blocks.a"].terms[0]
    assert (term.analysis, term.synthesis) == (block_dft(block), block_dft(block))


def test_by_the_definition(files: AdapterFiles) -> None:
    """delta_W[m b + i, j b + l] = w[m, j, (l - i) mod b] / q."""
    delta = reference.dense_delta(parse_adapter(files, ParserContext(base_of(tiny_model()))).deltas[Q])
    kernel = load(files.weights)[KERNEL].double()
    for m, i, j, lane in ((0, 0, 0, 0), (5, 3, 2, 1), (1, 15, 3, 0), (2, 7, 0, 15)):
        wanted = kernel[m, j, (lane - i) % 16] / 64
        assert float(delta[16 * m + i, 16 * j + lane]) == pytest.approx(float(wanted), rel=1e-12)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    config = peft.C3AConfig(target_modules=TARGETS, block_size=16)
    return files_in(peft_folder(tmp_path_factory.mktemp("c3a"), tiny_model(), config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(files: AdapterFiles, dtype: torch.dtype) -> None:
    kernel = load(files.weights)[KERNEL].to(dtype)
    parsed = parse_adapter(changed(files, tensors={KERNEL: kernel}), ParserContext(base_of(tiny_model())))
    core = parsed.deltas[Q].terms[0].core
    assert isinstance(core, CirculantCore)
    assert core.kernel.dtype == dtype
    assert torch.equal(core.kernel, kernel)


def test_missing_block_size_is_peft_s(tmp_path: Path) -> None:
    model = Layers({"a": (256, 512)})
    made = files_in(peft_folder(tmp_path, model, peft.C3AConfig(target_modules=["a"])))
    bare = changed(made, dict.fromkeys(("block_size", "block_size_pattern", "init_weights"), ...))
    assert parse_adapter(bare, ParserContext(base_of(model))).deltas["blocks.a"].terms[0].core.shape == (1, 2)


_GOOD = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(1))
_NAN = torch.where(torch.arange(16) == 3, torch.nan, _GOOD)

BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "block disagrees": ({"block_size": 8}, {}, InvalidAdapter, FIRST),
    "block does not divide": ({"block_size": 24}, {}, InvalidAdapter, "block_size"),
    "block enormous": ({"block_size": 10**4000}, {}, InvalidAdapter, "block_size"),
    "block 0": ({"block_size": 0}, {}, InvalidAdapter, "block_size"),
    "block null": ({"block_size": None}, {}, InvalidAdapter, "block_size"),
    "block true": ({"block_size": True}, {}, InvalidAdapter, "block_size"),
    "pattern disagrees": ({"block_size_pattern": {"q_proj": 8}}, {}, InvalidAdapter, KERNEL),
    "pattern does not divide": ({"block_size_pattern": {"q_proj": 5}}, {}, InvalidAdapter, "block_size_pattern"),
    "pattern of zero": ({"block_size_pattern": {"q_proj": 0}}, {}, InvalidAdapter, "block_size_pattern"),
    "pattern a list": ({"block_size_pattern": ["q_proj"]}, {}, InvalidAdapter, "block_size_pattern"),
    "pattern malformed": ({"block_size_pattern": {"(q_proj": 16}}, {}, InvalidAdapter, "block_size_pattern"),
    "bare alternatives": ({"block_size_pattern": {"q_proj|v_proj": 16}}, {}, UnsupportedAdapter, "block_size_pattern"),
    "init": ({"init_weights": "orthogonal"}, {}, InvalidAdapter, "init_weights"),
    "init a list": ({"init_weights": ["gaussian"]}, {}, InvalidAdapter, "init_weights"),
    "bias": ({"bias": "c3a_only"}, {}, UnsupportedAdapter, "bias"),
    "unknown key": ({"scaling": 1.0}, {}, InvalidAdapter, "scaling"),
    "rows": ({}, {KERNEL: _GOOD[:5]}, InvalidAdapter, KERNEL),
    "columns": ({}, {KERNEL: _GOOD.repeat(1, 2, 1)}, InvalidAdapter, KERNEL),
    "turned": ({}, {KERNEL: _GOOD.transpose(0, 1)}, InvalidAdapter, KERNEL),
    "two dimensions": ({}, {KERNEL: _GOOD[0]}, InvalidAdapter, KERNEL),
    "empty": ({}, {KERNEL: _GOOD[:0]}, InvalidAdapter, KERNEL),
    "integers": ({}, {KERNEL: torch.ones(6, 4, 16, dtype=torch.int32)}, InvalidAdapter, KERNEL),
    "NaN": ({}, {KERNEL: _NAN}, NonFiniteAdapter, KERNEL),
    "float64 too great": ({}, {KERNEL: _GOOD.double() * 1e200}, NonFiniteAdapter, KERNEL),
    "unknown tensor": ({}, {f"{KERNEL}.weight": _GOOD}, InvalidAdapter, f"{KERNEL}.weight"),
    "unknown layer": ({}, {f"{PREFIX}model.x.q_proj.c3a_kernel": _GOOD}, BaseModelMismatch, "model.x.q_proj"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(files: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(changed(files, config, tensors), ParserContext(base_of(tiny_model())))
    assert (type(raised.value), raised.value.field) == (error, field)
