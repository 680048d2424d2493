"""VeRA: PEFT's folders against PEFT's own merge in float64, its drawn matrices bit for bit, and folders that are wrong."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load

from overtone.adapters import AdapterFiles, BaseDescription, ParserContext, parse_adapter
from overtone.adapters.families import vera
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import FrameBank, prepare, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Q, assert_as_peft, changed, files_in, parse_folder
from support.peft_folders import load_peft, peft_folder
from support.tiny import tiny_model

A, B = "base_model.vera_A", "base_model.vera_B"
Q_B, Q_D = f"{PREFIX}{Q}.vera_lambda_b", f"{PREFIX}{Q}.vera_lambda_d"
TARGETS = ["q_proj", "v_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")  # PEFT's, of save_projection=False


@functools.cache
def _tiny() -> Any:
    """To read only: PEFT works on copies."""
    return tiny_model()


CONFIGS: dict[str, dict[str, Any]] = {
    "three layers": {"r": 4},
    "the head": {"r": 7, "target_modules": ["lm_head", "k_proj"], "projection_prng_key": 3},
    "PEFT's rank": {"target_modules": ["v_proj"], "d_initial": 0.5, "vera_dropout": 0.1},
    "one of one layer": {"r": 1, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str, saved: bool) -> None:
    settings = {"target_modules": TARGETS, "save_projection": saved, **CONFIGS[name]}
    parsed = assert_as_peft(peft_folder(tmp_path, _tiny(), peft.VeraConfig(**settings)), _tiny())
    stored = load((tmp_path / "adapter_model.safetensors").read_bytes())
    assert (A in stored) == saved
    numbers = sum(t.numel() for n, t in stored.items() if "lambda" in n)
    assert (parsed.family, parsed.parameter_count) == ("vera", numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("r", "key"), [(4, 0), (5, 2**64 - 1), (1, 7)])
def test_the_drawn_matrices_are_pefts(tmp_path: Path, dtype: torch.dtype, r: int, key: int) -> None:
    """Bit for bit, also on a base in half precision, to which PEFT rounds them."""
    model = tiny_model(dtype=dtype)
    config = peft.VeraConfig(r=r, target_modules=TARGETS, save_projection=False, projection_prng_key=key)
    folder = peft_folder(tmp_path, model, config)
    term = parse_folder(folder, model).deltas[Q].terms[0]
    loaded = load_peft(folder, model).base_model
    assert term.analysis.shared is not None
    assert term.synthesis.shared is not None
    assert torch.equal(term.analysis.shared.matrix, loaded.vera_A["default"])
    assert torch.equal(term.synthesis.shared.matrix, loaded.vera_B["default"].T)


def test_saved_and_drawn_are_one_shared_pair(tmp_path: Path) -> None:
    """Many adapters hold each matrix once; saved with the adapter or drawn again it has the same key."""
    folders = [
        peft_folder(
            tmp_path / str(i), _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=i < 2), seed=i
        )
        for i in range(4)
    ]
    context = ParserContext(base_of(_tiny()))
    terms = [t for f in folders for d in parse_adapter(files_in(f), context).deltas.values() for t in d.terms]
    assert len({term.analysis for term in terms}) == len({term.synthesis for term in terms}) == 1
    for half in (terms[: len(terms) // 2], terms[len(terms) // 2 :]):
        assert (
            len({id(term.analysis.shared) for term in half}) == len({id(term.synthesis.shared) for term in half}) == 1
        )


def test_a_larger_pair_than_needed(tmp_path: Path) -> None:
    files = files_in(peft_folder(tmp_path, _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS)))
    stored = load(files.weights)
    wider = {A: torch.cat((stored[A], torch.ones(4, 9)), 1), B: torch.cat((stored[B], torch.ones(5, 4)))}
    context = ParserContext(base_of(_tiny()))
    expected = parse_adapter(files, context).deltas
    for module, delta in parse_adapter(changed(files, tensors=wider), context).deltas.items():
        assert torch.equal(reference.dense_delta(delta), reference.dense_delta(expected[module]))


def test_half_precision_is_kept_and_exact(tmp_path: Path) -> None:
    files = files_in(peft_folder(tmp_path, _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS)))
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load(files.weights).items()}
    context = ParserContext(base_of(_tiny()))
    delta = parse_adapter(changed(files, tensors=halves), context).deltas[Q]
    wide = {name: tensor.double() for name, tensor in halves.items()}
    expected = torch.diag(wide[Q_B]) @ wide[B][:96] @ torch.diag(wide[Q_D]) @ wide[A][:, :64]
    assert torch.allclose(reference.dense_delta(delta), expected, rtol=1e-12, atol=0)
    assert delta.terms[0].core.values.dtype == torch.bfloat16


def test_the_fast_path_is_the_delta(tmp_path: Path) -> None:
    parsed = parse_folder(peft_folder(tmp_path, _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS)), _tiny())
    bank = FrameBank(torch.device("cpu"))
    for delta in parsed.deltas.values():
        (term,), (p, q) = delta.terms, delta.shape
        x = torch.randn(5, q, generator=torch.Generator().manual_seed(1))
        core = prepare(term.core)
        y = bank.synthesise(term.synthesis, core.apply(bank.analyse(term.analysis, x, core.shape[1])), p) * term.gain
        expected = x.double() @ reference.dense_delta(delta).T
        assert float((y - expected).norm()) <= 1e-6 * float(expected.norm())


Tensors = Mapping[str, torch.Tensor | None]
INF, NAN = float("inf"), float("nan")

BROKEN: dict[str, tuple[dict[str, Any], Tensors, type[InvalidAdapter], str]] = {
    "rank 0": ({"r": 0}, {}, InvalidAdapter, "r"),
    "rank as text": ({"r": "4"}, {}, InvalidAdapter, "r"),
    "a rank of billions": ({"r": 10**12}, {}, InvalidAdapter, f"{PREFIX}model.layers.0.mlp.down_proj.vera_lambda_d"),
    "PEFT's rank by default": ({"r": ...}, {}, InvalidAdapter, f"{PREFIX}model.layers.0.mlp.down_proj.vera_lambda_d"),
    "no seed": ({"projection_prng_key": None}, {}, InvalidAdapter, "projection_prng_key"),
    "a seed too large": ({"projection_prng_key": 2**64}, {}, InvalidAdapter, "projection_prng_key"),
    "save_projection null": ({"save_projection": None}, {}, InvalidAdapter, "save_projection"),
    "saved but said to be drawn": ({"save_projection": False}, {}, InvalidAdapter, A),
    "only B, said to be drawn": ({"save_projection": False}, {A: None}, InvalidAdapter, B),
    "no A": ({}, {A: None}, InvalidAdapter, A),
    "no B": ({}, {B: None}, InvalidAdapter, B),
    "A too narrow": ({}, {A: torch.ones(4, 95)}, InvalidAdapter, A),
    "A of rank 5": ({}, {A: torch.ones(5, 96)}, InvalidAdapter, A),
    "A as a vector": ({}, {A: torch.ones(384)}, InvalidAdapter, A),
    "A of integers": ({}, {A: torch.ones(4, 96, dtype=torch.int32)}, InvalidAdapter, A),
    "B too short": ({}, {B: torch.ones(95, 4)}, InvalidAdapter, B),
    "B turned": ({}, {B: torch.ones(4, 96)}, InvalidAdapter, B),
    "NaN in A": ({}, {A: torch.full((4, 96), NAN)}, NonFiniteAdapter, A),
    "infinity in B": ({}, {B: torch.full((96, 4), INF)}, NonFiniteAdapter, B),
    "A too large for float32": ({}, {A: torch.full((4, 96), 1e300, dtype=torch.float64)}, NonFiniteAdapter, A),
    "lambda_b too long": ({}, {Q_B: torch.ones(97)}, InvalidAdapter, Q_B),
    "lambda_b of integers": ({}, {Q_B: torch.ones(96, dtype=torch.int64)}, InvalidAdapter, Q_B),
    "NaN in lambda_b": ({}, {Q_B: torch.full((96,), NAN)}, NonFiniteAdapter, Q_B),
    "lambda_d too short": ({}, {Q_D: torch.ones(3)}, InvalidAdapter, Q_D),
    "lambda_d empty": ({}, {Q_D: torch.ones(0)}, InvalidAdapter, Q_D),
    "no lambda_b": ({}, {Q_B: None}, InvalidAdapter, Q_D),
    "a stranger": ({}, {f"{PREFIX}{Q}.vera_A": torch.ones(4, 96)}, InvalidAdapter, f"{PREFIX}{Q}.vera_A"),
    "an unknown module": ({}, {f"{PREFIX}x.vera_lambda_b": torch.ones(4), f"{PREFIX}x.vera_lambda_d": torch.ones(4)},
                          BaseModelMismatch, "x"),
    "biases": ({"bias": "vera_only"}, {}, UnsupportedAdapter, "bias"),
    "turned weights": ({"fan_in_fan_out": True}, {}, UnsupportedAdapter, "fan_in_fan_out"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, {}, UnsupportedAdapter, "modules_to_save"),
    "dropout as text": ({"vera_dropout": "0"}, {}, InvalidAdapter, "vera_dropout"),
    "an unknown key": ({"rank_pattern": {}}, {}, InvalidAdapter, "rank_pattern"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    folder = tmp_path_factory.mktemp("vera")
    return files_in(peft_folder(folder, _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS)))


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_are_refused(sound: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as caught:
        parse_adapter(changed(sound, config, tensors), ParserContext(base_of(_tiny())))
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field


def test_a_pair_for_no_module(sound: AdapterFiles) -> None:
    tensors = {name: None for name in load(sound.weights) if "lambda" in name}
    with pytest.raises(InvalidAdapter) as caught:
        parse_adapter(changed(sound, tensors=tensors), ParserContext(base_of(_tiny())))
    assert caught.value.field == "vera_lambda_b"


def test_few_bytes_do_not_draw_many_numbers(sound: AdapterFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vera, "draw", lambda *_: pytest.fail("drawn"))
    base = BaseDescription("b", "f" * 64, {"m": (1, 1 << 20)}, weight=lambda _: torch.zeros(1, 1))
    tensors = {**dict.fromkeys(load(sound.weights)), f"{PREFIX}m.vera_lambda_b": torch.ones(1)}
    tensors[f"{PREFIX}m.vera_lambda_d"] = torch.ones(1 << 8)
    keys = {"r": 1 << 8, "save_projection": False, "target_modules": ["m"]}
    with pytest.raises(UnsupportedAdapter) as caught:
        parse_adapter(changed(sound, keys, tensors), ParserContext(base))
    assert caught.value.field == "save_projection"


def test_drawing_needs_the_bases_precision(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, _tiny(), peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=False))
    bare = BaseDescription("tiny", "f" * 64, base_of(_tiny()).modules)
    with pytest.raises(BaseModelMismatch):
        parse_adapter(files_in(folder), ParserContext(bare))
