"""FourierFT: PEFT's folders against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.adapters.safetensors_writer import key_of
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import SparseCore, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Layers, Q, assert_as_peft, changed, files_in, parse_folder
from support.peft_folders import peft_folder
from support.tiny import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
SPECTRUM = f"{PREFIX}{Q}.fourierft_spectrum"
FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.fourierft_spectrum"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"n_frequency": 20},
    "head": {"n_frequency": 33, "target_modules": [*TARGETS, "lm_head"], "scaling": -3.25},
    "patterns": {
        "n_frequency": 20,
        "n_frequency_pattern": {"(q|k)_proj": 7, r"layers\.1\.mlp\..*": 9, "lm_head": 5, Q: 11},
        "target_modules": [*TARGETS, "lm_head"],
    },
    "seed 0": {"n_frequency": 20, "random_loc_seed": 0},
    "negative seed": {"n_frequency": 20, "random_loc_seed": -(2**63)},
    "great seed": {"n_frequency": 20, "random_loc_seed": 2**64 - 1},
    "from zeros": {"n_frequency": 20, "init_weights": True},
    "default n": {},
    "all coefficients": {"n_frequency": 48 * 64, "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    config = peft.FourierFTConfig(**{"target_modules": TARGETS, **CONFIGS[name]})
    parsed = assert_as_peft(peft_folder(tmp_path, model, config), model)
    saved = load(files_in(tmp_path).weights)
    assert parsed.family == "fourierft"
    assert parsed.parameter_count == sum(t.numel() for n, t in saved.items() if n.endswith("fourierft_spectrum"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (2, 2), (5, 7), (6, 9), (9, 6), (8, 10)])
def test_every_coefficient_of_odd_and_even_layers(tmp_path: Path, shape: tuple[int, int]) -> None:
    """n = p q: each frequency and its mirror images meet, the ends and the middles among them."""
    model = Layers({"a": shape})
    n = shape[0] * shape[1]
    folder = peft_folder(tmp_path, model, peft.FourierFTConfig(target_modules=["a"], n_frequency=n), seed=n)
    assert_as_peft(folder, model)


@pytest.mark.parametrize("place", range(30))
def test_single_coefficients(tmp_path: Path, place: int) -> None:
    """Each place of a 5 x 6 layer by itself, by the definition."""
    model = Layers({"a": (5, 6)})
    folder = peft_folder(tmp_path, model, peft.FourierFTConfig(target_modules=["a"], n_frequency=30, scaling=2.0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(777))
    one = torch.zeros(30)
    one[order == place] = 1.5
    files = changed(files_in(folder), tensors={f"{PREFIX}blocks.a.fourierft_spectrum": one})
    got = reference.dense_delta(parse_adapter(files, ParserContext(base_of(model))).deltas["blocks.a"])
    spectrum = torch.zeros(30, dtype=torch.float64)
    spectrum[place] = 1.5
    wanted = 2.0 * torch.fft.ifft2(spectrum.reshape(5, 6)).real
    assert float((got - wanted).norm()) <= 1e-7 * float(wanted.norm())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    config = peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20)
    return files_in(peft_folder(tmp_path_factory.mktemp("fourierft"), tiny_model(), config))


def test_what_many_adapters_share(files: AdapterFiles) -> None:
    context = ParserContext(base_of(tiny_model()))

    def core(adapter: AdapterFiles, layer: int = 0) -> SparseCore:
        found = parse_adapter(adapter, context).deltas[Q.replace(".0.", f".{layer}.")].terms[0].core
        assert isinstance(found, SparseCore)
        return found

    first = core(files)
    double = core(changed(files, tensors={SPECTRUM: 2 * load(files.weights)[SPECTRUM]}))
    assert double.pattern is first.pattern
    assert core(files, 1).pattern is first.pattern
    assert torch.equal(double.values, 2 * first.values)
    assert first.pattern.key == key_of(rows=first.rows, cols=first.cols)
    other = core(changed(files, {"random_loc_seed": 778}))
    assert other.pattern.key not in ("", first.pattern.key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precisions(files: AdapterFiles, dtype: torch.dtype) -> None:
    values = load(files.weights)[SPECTRUM].to(dtype)
    context = ParserContext(base_of(tiny_model()))
    stored = parse_adapter(changed(files, tensors={SPECTRUM: values}), context)
    widened = parse_adapter(changed(files, tensors={SPECTRUM: values.to(torch.float32)}), context)
    assert torch.equal(reference.dense_delta(stored.deltas[Q]), reference.dense_delta(widened.deltas[Q]))


def test_missing_keys_have_the_defaults_of_peft(tmp_path: Path) -> None:
    model = tiny_model()
    folder = peft_folder(tmp_path, model, peft.FourierFTConfig(target_modules=TARGETS))
    keys = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    bare = parse_adapter(changed(files_in(folder), dict.fromkeys(keys, ...)), ParserContext(base_of(model)))
    full = parse_folder(folder, model)
    assert torch.equal(reference.dense_delta(bare.deltas[Q]), reference.dense_delta(full.deltas[Q]))


_GOOD = torch.randn(20, generator=torch.Generator().manual_seed(1))
_NAN = torch.where(torch.arange(20) == 3, torch.nan, 1.0)

BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "no seed": ({"random_loc_seed": None}, {}, InvalidAdapter, "random_loc_seed"),
    "seed too great": ({"random_loc_seed": 2**64}, {}, InvalidAdapter, "random_loc_seed"),
    "seed too low": ({"random_loc_seed": -(2**63) - 1}, {}, InvalidAdapter, "random_loc_seed"),
    "seed true": ({"random_loc_seed": True}, {}, InvalidAdapter, "random_loc_seed"),
    "other seed number": ({"random_loc_seed": 777.0}, {}, InvalidAdapter, "random_loc_seed"),
    "n disagrees": ({"n_frequency": 21}, {}, InvalidAdapter, FIRST),
    "n enormous": ({"n_frequency": 10**4000}, {}, InvalidAdapter, FIRST),
    "n 0": ({"n_frequency": 0}, {}, InvalidAdapter, "n_frequency"),
    "n null": ({"n_frequency": None}, {}, InvalidAdapter, "n_frequency"),
    "pattern disagrees": ({"n_frequency_pattern": {"q_proj": 19}}, {}, InvalidAdapter, SPECTRUM),
    "pattern of text": ({"n_frequency_pattern": {"q_proj": "20"}}, {}, InvalidAdapter, "n_frequency_pattern"),
    "pattern malformed": ({"n_frequency_pattern": {"(q_proj": 20}}, {}, InvalidAdapter, "n_frequency_pattern"),
    "pattern repeated": ({"n_frequency_pattern": {"(a*)*b": 20}}, {}, UnsupportedAdapter, "n_frequency_pattern"),
    "bare alternatives": (
        {"n_frequency_pattern": {"q_proj|v_proj": 20}},
        {},
        UnsupportedAdapter,
        "n_frequency_pattern",
    ),
    "anchor": ({"n_frequency_pattern": {"^model.*": 20}}, {}, UnsupportedAdapter, "n_frequency_pattern"),
    "scaling null": ({"scaling": None}, {}, InvalidAdapter, "scaling"),
    "scaling text": ({"scaling": "150"}, {}, InvalidAdapter, "scaling"),
    "scaling overflows": ({"scaling": 1e300}, {}, NonFiniteAdapter, FIRST),
    "init": ({"init_weights": "zeros"}, {}, InvalidAdapter, "init_weights"),
    "bias": ({"bias": "all"}, {}, UnsupportedAdapter, "bias"),
    "fan in fan out": ({"fan_in_fan_out": True}, {}, UnsupportedAdapter, "fan_in_fan_out"),
    "unknown key": ({"ifft2_norm": "ortho"}, {}, InvalidAdapter, "ifft2_norm"),
    "too few": ({}, {SPECTRUM: _GOOD[:19]}, InvalidAdapter, SPECTRUM),
    "too many": ({}, {SPECTRUM: _GOOD.repeat(2)}, InvalidAdapter, SPECTRUM),
    "two dimensions": ({}, {SPECTRUM: _GOOD[None]}, InvalidAdapter, SPECTRUM),
    "a scalar": ({}, {SPECTRUM: _GOOD[0]}, InvalidAdapter, SPECTRUM),
    "empty": ({}, {SPECTRUM: _GOOD[:0]}, InvalidAdapter, SPECTRUM),
    "integers": ({}, {SPECTRUM: torch.arange(20)}, InvalidAdapter, SPECTRUM),
    "NaN": ({}, {SPECTRUM: _NAN}, NonFiniteAdapter, SPECTRUM),
    "infinity": ({}, {SPECTRUM: 1 / torch.zeros(20)}, NonFiniteAdapter, SPECTRUM),
    "float64 too great": ({}, {SPECTRUM: torch.full((20,), 1e200, dtype=torch.float64)}, NonFiniteAdapter, SPECTRUM),
    "unknown tensor": ({}, {f"{PREFIX}{Q}.spectrum": _GOOD}, InvalidAdapter, f"{PREFIX}{Q}.spectrum"),
    "unknown layer": ({}, {f"{PREFIX}model.x.q_proj.fourierft_spectrum": _GOOD}, BaseModelMismatch, "model.x.q_proj"),
    "embedding": (
        {},
        {f"{PREFIX}model.embed_tokens.fourierft_spectrum": _GOOD},
        BaseModelMismatch,
        "model.embed_tokens",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(files: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(changed(files, config, tensors), ParserContext(base_of(tiny_model())))
    assert (type(raised.value), raised.value.field) == (error, field)


def test_more_coefficients_than_weights(tmp_path: Path) -> None:
    """PEFT would not make it; the locations would repeat."""
    model = Layers({"a": (3, 5)})
    made = peft_folder(tmp_path, model, peft.FourierFTConfig(target_modules=["a"], n_frequency=15))
    name = f"{PREFIX}blocks.a.fourierft_spectrum"
    files = changed(files_in(made), {"n_frequency": 16}, {name: torch.ones(16)})
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(files, ParserContext(base_of(model)))
    assert raised.value.field == name


def test_no_tensors(files: AdapterFiles) -> None:
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(changed(files, {}, dict.fromkeys(load(files.weights))), ParserContext(base_of(tiny_model())))
    assert raised.value.field == "fourierft_spectrum"
