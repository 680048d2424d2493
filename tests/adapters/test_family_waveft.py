"""WaveFT: PEFT's folders against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.adapters.families.waveft import WAVELETS
from overtone.adapters.safetensors_writer import key_of
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import IDENTITY, SparseCore, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Layers, Q, assert_as_peft, changed, files_in
from support.peft_folders import peft_folder
from support.tiny import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
SPECTRUM = f"{PREFIX}{Q}.waveft_spectrum"
FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.waveft_spectrum"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"n_frequency": 20},
    "head": {"n_frequency": 33, "target_modules": [*TARGETS, "lm_head"], "scaling": -3.25, "wavelet_family": "db4"},
    "patterns": {
        "n_frequency": 20,
        "n_frequency_pattern": {"(q|k)_proj": 7, r"^model\.layers\.1\.mlp\..*": 9, "lm_head": 5, Q: 11},
        "target_modules": [*TARGETS, "lm_head"],
    },
    "seed 0": {"n_frequency": 20, "random_loc_seed": 0, "wavelet_family": "sym7"},
    "negative seed": {"n_frequency": 20, "random_loc_seed": -1},
    "not from zeros": {"n_frequency": 20, "init_weights": False, "wavelet_family": "coif2"},
    "default n": {},
    "no transform": {"n_frequency": 50, "use_idwt": False},
    "no transform, other wavelet": {"n_frequency": 50, "use_idwt": False, "wavelet_family": "db3"},
    "proportional": {"n_frequency": 51, "proportional_parameters": True, "target_modules": [*TARGETS, "lm_head"]},
    "proportional, at least one": {"n_frequency": 1, "proportional_parameters": True, "wavelet_family": "sym3"},
    "proportional before patterns": {
        "n_frequency": 40,
        "proportional_parameters": True,
        "n_frequency_pattern": {"q_proj": 3},
        "layers_to_transform": [1],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    config = peft.WaveFTConfig(**{"target_modules": TARGETS, **CONFIGS[name]})
    parsed = assert_as_peft(peft_folder(tmp_path, model, config), model)
    saved = load(files_in(tmp_path).weights)
    assert parsed.family == "waveft"
    assert parsed.parameter_count == sum(t.numel() for n, t in saved.items() if n.endswith("waveft_spectrum"))


def test_these_are_peft_s_wavelets() -> None:
    assert len(WAVELETS) == len(set(WAVELETS)) == 10 + 9 + 3


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_wavelet_on_every_coefficient(tmp_path: Path, wavelet: str) -> None:
    """n of every layer is all but a few of its weights; sides odd and even, far below and above the filters' lengths."""
    shapes = {"a": (7, 12), "b": (12, 7), "c": (5, 9), "d": (34, 8), "e": (1, 40), "f": (2, 31)}
    model = Layers(shapes)
    config = peft.WaveFTConfig(
        target_modules=list(shapes),
        n_frequency_pattern={name: p * q - p // 3 for name, (p, q) in shapes.items()},
        wavelet_family=wavelet,
    )
    assert_as_peft(peft_folder(tmp_path, model, config), model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    config = peft.WaveFTConfig(target_modules=TARGETS, n_frequency=20, wavelet_family="db2")
    return files_in(peft_folder(tmp_path_factory.mktemp("waveft"), tiny_model(), config))


def test_what_many_adapters_share(files: AdapterFiles) -> None:
    context = ParserContext(base_of(tiny_model()))

    def core(**keys: Any) -> SparseCore:
        found = parse_adapter(changed(files, keys), context).deltas[Q].terms[0].core
        assert isinstance(found, SparseCore)
        return found

    first = core()
    assert first.pattern.key == key_of(rows=first.rows, cols=first.cols)
    assert core(scaling=-3.0).pattern is first.pattern
    # The filters' length decides where the coefficients are, and so does whether there are any filters.
    assert core(wavelet_family="sym2").pattern is first.pattern
    for others in ({"wavelet_family": "db3"}, {"use_idwt": False}, {"random_loc_seed": 0}):
        assert core(**others).pattern.key not in ("", first.pattern.key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precisions(files: AdapterFiles, dtype: torch.dtype) -> None:
    values = load(files.weights)[SPECTRUM].to(dtype)
    context = ParserContext(base_of(tiny_model()))
    stored = parse_adapter(changed(files, tensors={SPECTRUM: values}), context)
    widened = parse_adapter(changed(files, tensors={SPECTRUM: values.to(torch.float32)}), context)
    assert torch.equal(reference.dense_delta(stored.deltas[Q]), reference.dense_delta(widened.deltas[Q]))


def test_missing_keys_have_the_defaults_of_peft(tmp_path: Path) -> None:
    model = tiny_model()
    files = files_in(peft_folder(tmp_path, model, peft.WaveFTConfig(target_modules=TARGETS)))
    keys = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    more = ("use_idwt", "wavelet_family", "proportional_parameters")
    context = ParserContext(base_of(model))
    bare = parse_adapter(changed(files, dict.fromkeys((*keys, *more), ...)), context)
    full = parse_adapter(files, context)
    assert torch.equal(reference.dense_delta(bare.deltas[Q]), reference.dense_delta(full.deltas[Q]))


def test_without_transform_the_coefficients_are_weights(files: AdapterFiles) -> None:
    parsed = parse_adapter(changed(files, {"use_idwt": False}), ParserContext(base_of(tiny_model())))
    term = parsed.deltas[Q].terms[0]
    assert (term.analysis, term.synthesis, term.core.shape) == (IDENTITY, IDENTITY, (96, 64))


_GOOD = torch.randn(20, generator=torch.Generator().manual_seed(1))
_NAN = torch.where(torch.arange(20) == 3, torch.nan, 1.0)

BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "coif4": ({"wavelet_family": "coif4"}, {}, UnsupportedAdapter, "wavelet_family"),
    "coif5": ({"wavelet_family": "coif5"}, {}, UnsupportedAdapter, "wavelet_family"),
    "db11": ({"wavelet_family": "db11"}, {}, UnsupportedAdapter, "wavelet_family"),
    "haar": ({"wavelet_family": "haar"}, {}, UnsupportedAdapter, "wavelet_family"),
    "wavelet null": ({"wavelet_family": None}, {}, UnsupportedAdapter, "wavelet_family"),
    "wavelet a list": ({"wavelet_family": ["db1"]}, {}, UnsupportedAdapter, "wavelet_family"),
    "idwt null": ({"use_idwt": None}, {}, InvalidAdapter, "use_idwt"),
    "idwt number": ({"use_idwt": 1}, {}, InvalidAdapter, "use_idwt"),
    "proportional null": ({"proportional_parameters": None}, {}, InvalidAdapter, "proportional_parameters"),
    "proportional disagrees": ({"proportional_parameters": True}, {}, InvalidAdapter, FIRST),
    "proportional enormous": (
        {"proportional_parameters": True, "n_frequency": 10**4000},
        {},
        InvalidAdapter,
        "n_frequency",
    ),
    "no seed": ({"random_loc_seed": None}, {}, InvalidAdapter, "random_loc_seed"),
    "seed too great": ({"random_loc_seed": 2**64}, {}, InvalidAdapter, "random_loc_seed"),
    "n disagrees": ({"n_frequency": 21}, {}, InvalidAdapter, FIRST),
    "n enormous": ({"n_frequency": 10**4000}, {}, InvalidAdapter, FIRST),
    "n 0": ({"n_frequency": 0}, {}, InvalidAdapter, "n_frequency"),
    "pattern disagrees": ({"n_frequency_pattern": {"q_proj": 19}}, {}, InvalidAdapter, SPECTRUM),
    "pattern of text": ({"n_frequency_pattern": {"q_proj": "20"}}, {}, InvalidAdapter, "n_frequency_pattern"),
    "pattern malformed": ({"n_frequency_pattern": {"(q_proj": 20}}, {}, InvalidAdapter, "n_frequency_pattern"),
    "pattern repeated": ({"n_frequency_pattern": {"(a*)*b": 20}}, {}, UnsupportedAdapter, "n_frequency_pattern"),
    "scaling null": ({"scaling": None}, {}, InvalidAdapter, "scaling"),
    "scaling overflows": ({"scaling": 1e300}, {}, NonFiniteAdapter, FIRST),
    "init": ({"init_weights": 0}, {}, InvalidAdapter, "init_weights"),
    "bias": ({"bias": "waveft_only"}, {}, UnsupportedAdapter, "bias"),
    "unknown key": ({"levels": 2}, {}, InvalidAdapter, "levels"),
    "too few": ({}, {SPECTRUM: _GOOD[:19]}, InvalidAdapter, SPECTRUM),
    "too many": ({}, {SPECTRUM: _GOOD.repeat(2)}, InvalidAdapter, SPECTRUM),
    "two dimensions": ({}, {SPECTRUM: _GOOD[None]}, InvalidAdapter, SPECTRUM),
    "empty": ({}, {SPECTRUM: _GOOD[:0]}, InvalidAdapter, SPECTRUM),
    "integers": ({}, {SPECTRUM: torch.arange(20)}, InvalidAdapter, SPECTRUM),
    "NaN": ({}, {SPECTRUM: _NAN}, NonFiniteAdapter, SPECTRUM),
    "infinity": ({}, {SPECTRUM: 1 / torch.zeros(20)}, NonFiniteAdapter, SPECTRUM),
    "unknown tensor": ({}, {f"{PREFIX}{Q}.spectrum": _GOOD}, InvalidAdapter, f"{PREFIX}{Q}.spectrum"),
    "unknown layer": ({}, {f"{PREFIX}model.x.q_proj.waveft_spectrum": _GOOD}, BaseModelMismatch, "model.x.q_proj"),
    "embedding": ({}, {f"{PREFIX}model.embed_tokens.waveft_spectrum": _GOOD}, BaseModelMismatch, "model.embed_tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(files: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as raised:
        parse_adapter(changed(files, config, tensors), ParserContext(base_of(tiny_model())))
    assert (type(raised.value), raised.value.field) == (error, field)


def test_no_tensors(files: AdapterFiles) -> None:
    none = dict.fromkeys(load(files.weights))
    for keys in ({}, {"proportional_parameters": True}):
        with pytest.raises(InvalidAdapter) as raised:
            parse_adapter(changed(files, keys, none), ParserContext(base_of(tiny_model())))
        assert raised.value.field == "waveft_spectrum"
