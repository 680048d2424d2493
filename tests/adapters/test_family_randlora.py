"""RandLoRA: PEFT's folders against PEFT's own merge in float64, its drawn matrices bit for bit, and broken folders."""

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
from overtone.adapters.families import randlora
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import FrameBank, FrameKind, prepare, reference
from support.peft_base import base_of
from support.peft_checks import PREFIX, Layers, Q, assert_as_peft, changed, files_in, parse_folder
from support.peft_folders import load_peft, peft_folder
from support.tiny import tiny_model

A, B = "base_model.randlora_A", "base_model.randlora_B"
DOWN = "model.layers.0.mlp.down_proj"
Q_LAMBDA, Q_GAMMA = f"{PREFIX}{Q}.randlora_lambda", f"{PREFIX}{Q}.randlora_gamma"
DOWN_LAMBDA = f"{PREFIX}{DOWN}.randlora_lambda"
TARGETS = ["q_proj", "v_proj", "down_proj"]
SHAPES = {"square": (24, 24), "wide": (20, 30), "tall": (30, 20), "line": (1, 30), "column": (30, 1)}
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")  # PEFT's, of save_projection=False


@functools.cache
def _tiny() -> Any:
    """To read only: PEFT works on copies."""
    return tiny_model()


CONFIGS: dict[str, dict[str, Any]] = {
    "tall and wide layers": {"r": 4},
    "a rank that divides nothing": {"r": 7, "randlora_alpha": 13, "projection_prng_key": 5},
    "one basis is enough": {"r": 100, "target_modules": ["v_proj", "o_proj"], "randlora_dropout": 0.1},
    "the head": {"r": 16, "target_modules": ["lm_head"]},
    "sparse": {"r": 8, "sparse": True},
    "very sparse": {"r": 8, "sparse": True, "very_sparse": True},
    "PEFT's rank in one layer": {"layers_to_transform": [1], "target_modules": ["down_proj", "k_proj"]},
}


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str, saved: bool) -> None:
    settings = {"target_modules": TARGETS, "save_projection": saved, **CONFIGS[name]}
    parsed = assert_as_peft(peft_folder(tmp_path, _tiny(), peft.RandLoraConfig(**settings)), _tiny())
    stored = load((tmp_path / "adapter_model.safetensors").read_bytes())
    assert (A in stored) == saved
    numbers = sum(t.numel() for n, t in stored.items() if n.endswith(("lambda", "gamma")))
    assert (parsed.family, parsed.parameter_count) == ("randlora", numbers)


@pytest.mark.parametrize("r", [1, 5, 6, 64])
def test_square_layers_and_layers_of_one_line(tmp_path: Path, r: int) -> None:
    model = Layers(SHAPES)
    parsed = assert_as_peft(peft_folder(tmp_path, model, peft.RandLoraConfig(r=r, target_modules=list(SHAPES))), model)
    sides = {name: parsed.deltas[f"blocks.{name}"].terms[0].analysis.kind for name in SHAPES}
    projected = {name for name, kind in sides.items() if kind is FrameKind.PROJECTION}
    assert projected == {"wide", "line"}  # more inputs than outputs; the square one goes with the tall ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"sparse": True}, {"very_sparse": True}], ids=["dense", "sparse", "very"])
@pytest.mark.parametrize(("r", "key"), [(4, 0), (7, 2**64 - 1)])
def test_the_drawn_matrices_are_pefts(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any], r: int, key: int
) -> None:
    """Bit for bit, also on a base in half precision, to which PEFT rounds them."""
    model = tiny_model(dtype=dtype)
    settings = {"r": r, "target_modules": TARGETS, "projection_prng_key": key, **changes}
    folder = peft_folder(tmp_path, model, peft.RandLoraConfig(save_projection=False, **settings))
    term = parse_folder(folder, model).deltas[Q].terms[0]
    loaded = load_peft(folder, model).base_model
    assert term.synthesis.shared is not None
    assert torch.equal(term.core.basis.matrix, loaded.randlora_A["default"][:, 0])
    assert torch.equal(term.synthesis.shared.matrix, loaded.randlora_B["default"].flatten(1).T)


def test_saved_and_drawn_are_one_shared_pair(tmp_path: Path) -> None:
    """Many adapters hold each matrix once; saved with the adapter or drawn again it has the same key."""
    folders = [
        peft_folder(
            tmp_path / str(i), _tiny(), peft.RandLoraConfig(r=8, target_modules=TARGETS, save_projection=i < 2), seed=i
        )
        for i in range(4)
    ]
    context = ParserContext(base_of(_tiny()))
    terms = [t for f in folders for d in parse_adapter(files_in(f), context).deltas.values() for t in d.terms]
    frames = [t.synthesis if t.analysis.kind is FrameKind.IDENTITY else t.analysis for t in terms]
    assert len({term.core.basis for term in terms}) == len(set(frames)) == 1
    for half in (slice(0, len(terms) // 2), slice(len(terms) // 2, None)):
        assert len({id(term.core.basis) for term in terms[half]}) == 1
        assert len({id(frame.shared) for frame in frames[half]}) == 1


def test_a_larger_pair_than_needed(tmp_path: Path) -> None:
    files = files_in(peft_folder(tmp_path, _tiny(), peft.RandLoraConfig(r=8, target_modules=TARGETS)))
    stored = load(files.weights)
    wider_b = torch.full((101, 20, 8), 3.0)
    wider_b[:96, :12] = stored[B]
    wider = {A: torch.cat((stored[A], torch.ones(8, 1, 9)), 2), B: wider_b}
    copies = {name: wider[A if name.endswith("A") else B].clone() for name in stored if name.endswith(("lora_A", "_B"))}
    context = ParserContext(base_of(_tiny()))
    expected = parse_adapter(files, context).deltas
    for module, delta in parse_adapter(changed(files, tensors=copies), context).deltas.items():
        assert torch.equal(reference.dense_delta(delta), reference.dense_delta(expected[module]))


def test_half_precision_is_kept_and_copies_are_optional(tmp_path: Path) -> None:
    files = files_in(peft_folder(tmp_path, _tiny(), peft.RandLoraConfig(r=5, target_modules=TARGETS)))
    halves: dict[str, torch.Tensor | None] = {n: t.bfloat16() for n, t in load(files.weights).items()}
    wide = {name: tensor.double() for name, tensor in halves.items() if tensor is not None}
    halves |= {name: None for name in halves if name.endswith(("_A", "_B")) and name not in (A, B)}
    delta = parse_adapter(changed(files, {"randlora_alpha": 2.5}, halves), ParserContext(base_of(_tiny()))).deltas[Q]
    update_a = torch.einsum("kj,ki,ji->kji", wide[Q_LAMBDA], wide[A][:, 0, :64], wide[Q_GAMMA]).reshape(65, 64)
    expected = 0.5 * wide[B][:96, :13].reshape(96, 65) @ update_a
    assert torch.allclose(reference.dense_delta(delta), expected, rtol=1e-9, atol=1e-12)
    assert delta.terms[0].core.lam.dtype == delta.terms[0].core.gamma.dtype == torch.bfloat16


@pytest.mark.parametrize("r", [3, 16, 100])
def test_the_fast_path_is_the_delta(tmp_path: Path, r: int) -> None:
    parsed = parse_folder(peft_folder(tmp_path, _tiny(), peft.RandLoraConfig(r=r, target_modules=TARGETS)), _tiny())
    bank = FrameBank(torch.device("cpu"))
    for delta in parsed.deltas.values():
        (term,), (p, q) = delta.terms, delta.shape
        x = torch.randn(5, q, generator=torch.Generator().manual_seed(1))
        core = prepare(term.core)
        y = bank.synthesise(term.synthesis, core.apply(bank.analyse(term.analysis, x, core.shape[1])), p)
        expected = x.double() @ reference.dense_delta(delta).T
        assert float((y - expected).norm()) <= 1e-6 * float(expected.norm())


Tensors = Mapping[str, torch.Tensor | None]
INF, NAN = float("inf"), float("nan")
COPY = f"{PREFIX}{Q}.randlora_B"

BROKEN: dict[str, tuple[dict[str, Any], Tensors, type[InvalidAdapter], str]] = {
    "rank 0": ({"r": 0}, {}, InvalidAdapter, "r"),
    "rank true": ({"r": True}, {}, InvalidAdapter, "r"),
    "another rank": ({"r": 8}, {}, InvalidAdapter, DOWN_LAMBDA),
    "a rank beyond floats": ({"r": 10**400}, {}, InvalidAdapter, DOWN_LAMBDA),
    "alpha as text": ({"randlora_alpha": "640"}, {}, InvalidAdapter, "randlora_alpha"),
    "alpha too large for float32": ({"randlora_alpha": 1e300}, {}, NonFiniteAdapter, DOWN_LAMBDA),
    "no seed": ({"projection_prng_key": None}, {}, InvalidAdapter, "projection_prng_key"),
    "a seed too small": ({"projection_prng_key": -(2**63) - 1}, {}, InvalidAdapter, "projection_prng_key"),
    "save_projection null": ({"save_projection": None}, {}, InvalidAdapter, "save_projection"),
    "saved but said to be drawn": ({"save_projection": False}, {}, InvalidAdapter, A),
    "copies but said to be drawn": (
        {"save_projection": False},
        {A: None, B: None},
        InvalidAdapter,
        f"{PREFIX}{DOWN}.randlora_A",
    ),
    "no A": ({}, {A: None}, InvalidAdapter, A),
    "no B": ({}, {B: None}, InvalidAdapter, B),
    "A without its axis": ({}, {A: torch.ones(4, 96)}, InvalidAdapter, A),
    "A of two bases": ({}, {A: torch.ones(4, 2, 96)}, InvalidAdapter, A),
    "A of rank 3": ({}, {A: torch.ones(3, 1, 96)}, InvalidAdapter, A),
    "A too narrow": ({}, {A: torch.ones(4, 1, 63)}, InvalidAdapter, A),
    "B too short": ({}, {B: torch.ones(95, 24, 4)}, InvalidAdapter, B),
    "B of too few bases": ({}, {B: torch.ones(96, 15, 4)}, InvalidAdapter, B),
    "B of rank 5": ({}, {B: torch.ones(96, 24, 5)}, InvalidAdapter, B),
    "B of integers": ({}, {B: torch.ones(96, 24, 4, dtype=torch.int8)}, InvalidAdapter, B),
    "NaN in A": ({}, {A: torch.full((4, 1, 96), NAN)}, NonFiniteAdapter, A),
    "infinity in B": ({}, {B: torch.full((96, 24, 4), INF)}, NonFiniteAdapter, B),
    "another copy": ({}, {COPY: torch.ones(96, 24, 4)}, InvalidAdapter, COPY),
    "a copy of another shape": ({}, {COPY: torch.ones(96, 16, 4)}, InvalidAdapter, COPY),
    "a copy of another dtype": ({}, {COPY: torch.zeros(96, 24, 4).half()}, InvalidAdapter, COPY),
    "lambda turned": ({}, {Q_LAMBDA: torch.ones(16, 4)}, InvalidAdapter, Q_LAMBDA),
    "lambda of one basis too many": ({}, {Q_LAMBDA: torch.ones(4, 17)}, InvalidAdapter, Q_LAMBDA),
    "NaN in lambda": ({}, {Q_LAMBDA: torch.full((4, 16), NAN)}, NonFiniteAdapter, Q_LAMBDA),
    "gamma too wide": ({}, {Q_GAMMA: torch.ones(16, 96)}, InvalidAdapter, Q_GAMMA),
    "gamma of integers": ({}, {Q_GAMMA: torch.ones(16, 64).int()}, InvalidAdapter, Q_GAMMA),
    "infinity in gamma": ({}, {Q_GAMMA: torch.full((16, 64), INF)}, NonFiniteAdapter, Q_GAMMA),
    "gamma empty": ({}, {Q_GAMMA: torch.ones(16, 0)}, InvalidAdapter, Q_GAMMA),
    "no gamma": ({}, {Q_GAMMA: None}, InvalidAdapter, f"{PREFIX}{Q}.randlora_A"),
    "a stranger": ({}, {"base_model.randlora_C": torch.ones(1)}, InvalidAdapter, "base_model.randlora_C"),
    "an unknown module": (
        {},
        {f"{PREFIX}x.randlora_lambda": torch.ones(4, 1), f"{PREFIX}x.randlora_gamma": torch.ones(1, 4)},
        BaseModelMismatch,
        "x",
    ),
    "biases": ({"bias": "all"}, {}, UnsupportedAdapter, "bias"),
    "turned weights": ({"fan_in_fan_out": True}, {}, UnsupportedAdapter, "fan_in_fan_out"),
    "sparse as a number": ({"sparse": 1}, {}, InvalidAdapter, "sparse"),
    "an unknown key": ({"use_dora": False}, {}, InvalidAdapter, "use_dora"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> AdapterFiles:
    folder = tmp_path_factory.mktemp("randlora")
    return files_in(peft_folder(folder, _tiny(), peft.RandLoraConfig(r=4, target_modules=TARGETS)))


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_are_refused(sound: AdapterFiles, name: str) -> None:
    config, tensors, error, field = BROKEN[name]
    with pytest.raises(InvalidAdapter) as caught:
        parse_adapter(changed(sound, config, tensors), ParserContext(base_of(_tiny())))
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field


def _drawn(shape: tuple[int, int], **keys: Any) -> AdapterFiles:
    """One module m of this shape, rank 1, whose matrices must be drawn."""
    small = min(shape)
    tensors = {"lambda": torch.ones(1, small), "gamma": torch.ones(small, small)}
    empty = AdapterFiles(b'{"peft_type": "RANDLORA", "r": 1, "save_projection": false}', b"\2\0\0\0\0\0\0\0{}")
    return changed(empty, keys, {f"{PREFIX}m.randlora_{part}": tensor for part, tensor in tensors.items()})


def test_few_bytes_do_not_draw_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randlora, "draw", lambda *_: pytest.fail("drawn"))
    base = BaseDescription("b", "f" * 64, {"m": (4, 1 << 26)}, weight=lambda _: torch.zeros(1, 1))
    with pytest.raises(UnsupportedAdapter) as caught:
        parse_adapter(_drawn((4, 1 << 26)), ParserContext(base))
    assert caught.value.field == "save_projection"


@pytest.mark.parametrize("variant", [{}, {"sparse": True}])
def test_a_seed_that_draws_no_numbers(variant: dict[str, bool]) -> None:
    """The standard deviation of a single number is not one."""
    base = BaseDescription("b", "f" * 64, {"m": (1, 1)}, weight=lambda _: torch.zeros(1, 1))
    with pytest.raises(NonFiniteAdapter) as caught:
        parse_adapter(_drawn((1, 1), **variant), ParserContext(base))
    assert caught.value.field == "projection_prng_key"
