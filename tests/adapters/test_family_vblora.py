"""VB-LoRA: PEFT's folders in both forms against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load, save

from overtone.adapters import AdapterFiles, BaseDescription, ParsedAdapter, ParserContext, parse_adapter
from overtone.errors import (
    AdapterIndexOutOfRange,
    BaseModelMismatch,
    InvalidAdapter,
    NonFiniteAdapter,
    UnsupportedAdapter,
)
from overtone.kernels import LowRankCore, reference, sound
from support.peft_base import base_of
from support.peft_folders import load_peft, peft_deltas, peft_folder
from support.tiny import tiny_model

RELATIVE = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


@functools.cache
def _tiny() -> Any:
    """To read only: PEFT works on copies."""
    return tiny_model()


def _parse(files: AdapterFiles, base: BaseDescription | None = None) -> ParsedAdapter:
    return parse_adapter(files, ParserContext(base or base_of(_tiny())))


def _files(folder: Path) -> AdapterFiles:
    return AdapterFiles(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def assert_matches(parsed: ParsedAdapter, expected: dict[str, torch.Tensor]) -> None:
    assert parsed.deltas.keys() == expected.keys()
    for module, delta in parsed.deltas.items():
        core = delta.terms[0].core
        assert isinstance(core, LowRankCore)
        assert core.a.dtype == core.b.dtype == torch.float32
        assert sound(core)
        got = reference.dense_delta(delta)
        assert got.shape == expected[module].shape
        assert float((got - expected[module]).norm()) <= RELATIVE * float(expected[module].norm()), module


CONFIGS: dict[str, dict[str, Any]] = {
    "two of eight": {"vector_length": 16, "num_vectors": 8},
    "one of eight": {"vector_length": 16, "num_vectors": 8, "topk": 1},
    "all of five": {"vector_length": 8, "num_vectors": 5, "topk": 5, "r": 3, "init_logits_std": 2.0},
    "three of three hundred": {"vector_length": 16, "num_vectors": 300, "topk": 3, "r": 1, "vblora_dropout": 0.5},
    "numbers instead of vectors": {"vector_length": 1, "num_vectors": 9, "topk": 4, "target_modules": ["v_proj"]},
    "the head": {"vector_length": 2, "num_vectors": 40, "target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("compact", [False, True], ids=["logits", "topk"])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str, compact: bool) -> None:
    settings = {"target_modules": TARGETS, "save_only_topk_weights": compact, **CONFIGS[name]}
    folder = peft_folder(tmp_path, _tiny(), peft.VBLoRAConfig(**settings))
    parsed = _parse(_files(folder))
    assert_matches(parsed, peft_deltas(folder, _tiny()))
    stored = load((folder / "adapter_model.safetensors").read_bytes())
    numbers = [t.numel() for n, t in stored.items() if "vblora" in n and t.is_floating_point()]
    assert (parsed.family, parsed.parameter_count) == ("vblora", sum(numbers))


def test_a_compact_adapter_saved_again_as_logits(tmp_path: Path) -> None:
    """PEFT then writes minus infinity for the vectors that the compact form had left out."""
    settings = {"target_modules": TARGETS, "vector_length": 16, "num_vectors": 8}
    compact = peft_folder(tmp_path / "a", _tiny(), peft.VBLoRAConfig(**settings, save_only_topk_weights=True))
    again = load_peft(compact, _tiny())
    again.peft_config["default"].save_only_topk_weights = False
    again.save_pretrained(str(tmp_path / "b"))
    logits = load((tmp_path / "b" / "adapter_model.safetensors").read_bytes())
    assert any(bool(t.isneginf().any()) for t in logits.values())
    first, second = _parse(_files(compact)), _parse(_files(tmp_path / "b"))
    assert_matches(second, {m: reference.dense_delta(d) for m, d in first.deltas.items()})
    # More vectors than the compact form kept: those that it left out weigh nothing.
    wider = {**json.loads((tmp_path / "b" / "adapter_config.json").read_text()), "topk": 5}
    third = _parse(AdapterFiles(json.dumps(wider).encode(), _files(tmp_path / "b").weights))
    assert_matches(third, {m: reference.dense_delta(d) for m, d in first.deltas.items()})


BASE = BaseDescription("b", "f" * 64, {"m": (6, 4)})
BANK = "base_model.vblora_vector_bank"
A, B = "base_model.model.m.vblora_logits_A", "base_model.model.m.vblora_logits_B"
CONFIG = {"peft_type": "VBLORA", "r": 3, "num_vectors": 5, "vector_length": 2, "topk": 2}
Tensors = dict[str, torch.Tensor]


def _sound(*, compact: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {BANK: torch.randn(5, 2, generator=generator)}
    for name, grid in ((A, (3, 2)), (B, (3, 3))):
        logits = torch.randn(*grid, 5, generator=generator)
        if compact:
            values, indices = logits.topk(2)
            tensors[f"{name}_topk_indices"] = indices.to(torch.uint8)
            tensors[f"{name}_topk_weights"] = values.softmax(-1)[..., :-1].contiguous()
        else:
            tensors[name] = logits
    return tensors


def _of(config: dict[str, Any], tensors: Tensors) -> AdapterFiles:
    return AdapterFiles(json.dumps(config).encode(), save({n: t.clone().contiguous() for n, t in tensors.items()}))


def _dense(a: list[list[list[float]]], b: list[list[list[float]]], bank: torch.Tensor) -> torch.Tensor:
    """B A, term by term, from the weight of every vector of the bank."""
    mixed_a, mixed_b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    low = torch.cat([mixed_a[:, t] @ bank.double() for t in range(mixed_a.shape[1])], dim=1)
    high = torch.cat([(mixed_b[t] @ bank.double()).T for t in range(mixed_b.shape[0])], dim=0)
    return high @ low


def test_equal_logits_count_alike() -> None:
    """Two equal largest logits are half of the mixture each, in whichever order they come; both forms and dtypes."""
    bank = torch.tensor([[1.0, 2.0], [-3.0, 5.0], [0.5, 0.25]])
    one = torch.tensor([[[4.0, 4.0, 1.0]]])
    config = {**CONFIG, "r": 1, "num_vectors": 3, "topk": 2}
    base = BaseDescription("b", "f" * 64, {"m": (2, 2)})
    expected = _dense([[[0.5, 0.5, 0]]], [[[0.5, 0.5, 0]]], bank)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        logits = {BANK: bank, A: one.to(dtype), B: one.to(dtype)}
        assert_matches(_parse(_of(config, logits), base), {"m": expected})
    for order in ([0, 1], [1, 0]):
        parts = {"_topk_indices": torch.tensor([[order]]), "_topk_weights": torch.tensor([[[0.5]]])}
        compact = {BANK: bank, **{side + n: t for side in (A, B) for n, t in parts.items()}}
        assert_matches(_parse(_of({**config, "save_only_topk_weights": True}, compact), base), {"m": expected})


def test_the_last_weight_may_round_below_zero() -> None:
    """Rounded to bfloat16, the others may add up to more than 1; what was left out is then nothing, not its negative."""
    bank = torch.tensor([[1.0, 2.0], [-3.0, 5.0], [100.0, -200.0]])
    config = {**CONFIG, "r": 1, "num_vectors": 3, "topk": 3, "save_only_topk_weights": True}
    base = BaseDescription("b", "f" * 64, {"m": (2, 2)})
    weights = torch.tensor([[[0.5, 0.5078125]]], dtype=torch.bfloat16)
    parts = {"_topk_indices": torch.tensor([[[0, 1, 2]]]), "_topk_weights": weights}
    parsed = _parse(_of(config, {BANK: bank, **{side + n: t for side in (A, B) for n, t in parts.items()}}), base)
    kept = [[[0.5 / 1.0078125, 0.5078125 / 1.0078125, 0]]]
    assert_matches(parsed, {"m": _dense(kept, kept, bank)})


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


def _with(position: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[position] = value
        return tensor

    return change


INF = float("inf")
A_N, A_W = f"{A}_topk_indices", f"{A}_topk_weights"
Case = tuple[Callable[[Tensors], Tensors], type[InvalidAdapter], str]

BROKEN_LOGITS: dict[str, Case] = {
    "no tensors": (lambda t: {}, InvalidAdapter, BANK),
    "no bank": (lambda t: {n: v for n, v in t.items() if n != BANK}, InvalidAdapter, BANK),
    "nothing but the bank": (lambda t: {BANK: t[BANK]}, InvalidAdapter, "vblora_logits_A"),
    "bank too short": (_changed(BANK, lambda t: t[:4]), InvalidAdapter, BANK),
    "bank of longer vectors": (_changed(BANK, lambda t: torch.ones(5, 3)), InvalidAdapter, BANK),
    "bank of integers": (_changed(BANK, lambda t: t.to(torch.int32)), InvalidAdapter, BANK),
    "NaN in the bank": (_changed(BANK, _with((0, 0), float("nan"))), NonFiniteAdapter, BANK),
    "no B": (lambda t: {n: v for n, v in t.items() if n != B}, InvalidAdapter, A),
    "A of rank 2": (_changed(A, lambda t: t[:2]), InvalidAdapter, A),
    "A with a tile too many": (_changed(A, lambda t: torch.ones(3, 3, 5)), InvalidAdapter, A),
    "B turned": (_changed(B, lambda t: torch.ones(3, 4, 5)), InvalidAdapter, B),
    "logits for another bank": (_changed(B, lambda t: t[..., :4]), InvalidAdapter, B),
    "logits of integers": (_changed(A, lambda t: t.to(torch.int64)), InvalidAdapter, A),
    "NaN": (_changed(A, _with((1, 1, 2), float("nan"))), NonFiniteAdapter, A),
    "infinity": (_changed(B, _with((2, 0, 4), INF)), NonFiniteAdapter, B),
    "nothing but minus infinity": (_changed(A, lambda t: torch.full_like(t, -INF)), NonFiniteAdapter, A),
    "the other form": (lambda t: _sound(compact=True), InvalidAdapter, A_N),
    "an unknown module": (
        lambda t: {n.replace(".m.", ".n."): v for n, v in t.items()},
        BaseModelMismatch,
        "n",
    ),
    "a stranger": (
        lambda t: {**t, "base_model.model.m.other": torch.ones(1)},
        InvalidAdapter,
        "base_model.model.m.other",
    ),
}

BROKEN_TOPK: dict[str, Case] = {
    "the other form": (lambda t: _sound(), InvalidAdapter, A),
    "no weights": (lambda t: {n: v for n, v in t.items() if n != A_W}, InvalidAdapter, A_N),
    "index too large": (_changed(A_N, _with((2, 1, 0), 5)), AdapterIndexOutOfRange, A_N),
    "index below zero": (
        _changed(A_N, lambda t: _with((0, 0, 1), -1)(t.to(torch.int16))),
        AdapterIndexOutOfRange,
        A_N,
    ),
    "a vector twice": (_changed(A_N, lambda t: torch.ones_like(t)), InvalidAdapter, A_N),
    "indices of floats": (_changed(A_N, lambda t: t.float()), InvalidAdapter, A_N),
    "three indices": (_changed(A_N, lambda t: torch.zeros(3, 2, 3, dtype=torch.uint8)), InvalidAdapter, A_N),
    "two weights": (_changed(A_W, lambda t: torch.ones(3, 2, 2)), InvalidAdapter, A_W),
    "weights of integers": (_changed(A_W, lambda t: t.to(torch.int8)), InvalidAdapter, A_W),
    "a negative weight": (_changed(A_W, _with((0, 1, 0), -0.1)), InvalidAdapter, A_W),
    "weights above 1": (_changed(A_W, _with((0, 1, 0), 1.1)), InvalidAdapter, A_W),
    "NaN": (_changed(A_W, _with((0, 1, 0), float("nan"))), NonFiniteAdapter, A_W),
}


def _refused(config: dict[str, Any], tensors: Tensors, error: type[InvalidAdapter], field: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        _parse(_of(config, tensors), BASE)
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field


@pytest.mark.parametrize("name", BROKEN_LOGITS)
def test_logits_that_are_refused(name: str) -> None:
    change, error, field = BROKEN_LOGITS[name]
    _refused(CONFIG, change(_sound()), error, field)


@pytest.mark.parametrize("name", BROKEN_TOPK)
def test_compact_tensors_that_are_refused(name: str) -> None:
    change, error, field = BROKEN_TOPK[name]
    _refused({**CONFIG, "save_only_topk_weights": True}, change(_sound(compact=True)), error, field)


def test_a_single_vector_needs_no_weight() -> None:
    config = {**CONFIG, "topk": 1, "save_only_topk_weights": True}
    tensors = {n: t[..., :1] if n.endswith("indices") else t[..., :0] for n, t in _sound(compact=True).items()}
    assert list(_parse(_of(config, {**tensors, BANK: _sound()[BANK]}), BASE).deltas) == ["m"]


@pytest.mark.parametrize(
    ("key", "value", "error", "field"),
    [
        ("r", 0, InvalidAdapter, "r"),
        ("r", 1.5, InvalidAdapter, "r"),
        ("r", 10**12, InvalidAdapter, A),
        ("num_vectors", 10**12, InvalidAdapter, BANK),
        ("num_vectors", None, InvalidAdapter, "num_vectors"),
        ("vector_length", 10**400, InvalidAdapter, BANK),
        ("topk", 0, InvalidAdapter, "topk"),
        ("topk", 6, InvalidAdapter, "topk"),
        ("save_only_topk_weights", "yes", InvalidAdapter, "save_only_topk_weights"),
        ("save_only_topk_weights", True, InvalidAdapter, A),
        ("vblora_dropout", -0.1, InvalidAdapter, "vblora_dropout"),
        ("init_logits_std", "0.1", InvalidAdapter, "init_logits_std"),
        ("init_vector_bank_bound", None, InvalidAdapter, "init_vector_bank_bound"),
        ("bias", "all", UnsupportedAdapter, "bias"),
        ("fan_in_fan_out", True, UnsupportedAdapter, "fan_in_fan_out"),
        ("modules_to_save", ["lm_head"], UnsupportedAdapter, "modules_to_save"),
        ("vblora_other", 1, InvalidAdapter, "vblora_other"),
        ("target_modules", ["n"], InvalidAdapter, "target_modules"),
    ],
)
def test_keys_that_are_refused(key: str, value: object, error: type[InvalidAdapter], field: str) -> None:
    _refused({**CONFIG, key: value}, _sound(), error, field)


@pytest.mark.parametrize("shape", [(6, 5), (5, 4)])
def test_vectors_must_tile_the_layer(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidAdapter, match="does not divide") as caught:
        _parse(_of(CONFIG, _sound()), BaseDescription("b", "f" * 64, {"m": shape}))
    assert caught.value.field == "vector_length"


def test_an_adapter_may_not_expand_without_bound() -> None:
    with pytest.raises(UnsupportedAdapter) as caught:
        parse_adapter(_of(CONFIG, _sound()), ParserContext(BASE, max_numbers=29))
    assert caught.value.field == "r"
    assert list(parse_adapter(_of(CONFIG, _sound()), ParserContext(BASE, max_numbers=30)).deltas) == ["m"]
