"""What is refused, by the name of the field: budgets, layers that do not fit, checkpoints of something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.errors import InvalidRequest
from overtone.tuning.methods import METHODS, make_method
from support.adapters import adapter_files
from support.peft_base import base_of
from support.tiny import tiny_model
from support.tuned import small_method

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *((name, "targets", value) for name in METHODS for value in ("q_proj", [], ["q_proj", "q_proj"], [3], [""])),
        *((name, "n", value) for name in ("loca", "sdctft", "fourierft") for value in (0, -1, 2.0, True, None)),
        *((name, "scale", value) for name in ("loca", "sdctft", "fourierft") for value in (0, NAN, "1", True)),
        *((name, "dropout", value) for name in ("loca", "dcft", "lora") for value in (-0.1, 1, NAN, None)),
        *((name, "init", value) for name in ("sdctft", "dcft", "fourierft") for value in ("random", None)),
        ("loca", "learn_locations", 1),
        ("loca", "location_steps", -1),
        ("loca", "location_lr", 0),
        ("sdctft", "energy_ratio", 1.1),
        ("sdctft", "band_limit", "quarter"),
        ("dcft", "d", 0),
        ("dcft", "rank", 0),
        ("dcft", "alpha", 0),
        ("dcft", "lora_r", 0),
        ("dcft", "reg", -1),
        ("pica", "rank", 0),
        ("pica", "include_basis", "yes"),
        ("lora", "r", 0),
        ("lora", "alpha", -1),
        ("lora", "rslora", None),
        ("fourierft", "location_seed", -1),
        ("loca", "rank", 3),
    ],
)
def test_budgets_are_checked_by_field(name: str, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_method(name, **{field: value})
    assert caught.value.field == field


def test_there_are_six_methods() -> None:
    assert list(METHODS) == ["loca", "sdctft", "dcft", "pica", "lora", "fourierft"]
    for name, kind in METHODS.items():
        method = make_method(name, targets=("k_proj",))
        assert type(method) is kind
        assert (method.name, method.targets) == (name, ("k_proj",))
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.targets = ()  # type: ignore[misc]
    with pytest.raises(InvalidRequest, match="no method 'adalora'") as caught:
        make_method("adalora")
    assert caught.value.field == "method"


@pytest.mark.parametrize(
    ("name", "options", "field", "reason"),
    [
        *((name, {"targets": ["query"]}, "targets", "no layer of the model is called query") for name in METHODS),
        *((name, {"targets": ["mlp"]}, "targets", "LlamaMLP, not a plain linear") for name in METHODS),
        *((n, {"n": 48 * 64 + 1}, "n", "v_proj has only 48 x 64") for n in ("loca", "sdctft", "fourierft")),
        ("dcft", {"d": 5}, "d", "which does not divide both sides of model.layers.0.self_attn.q_proj, 96 x 64"),
        ("dcft", {"d": 8, "rank": 7}, "rank", "it can be at most 6"),
        ("pica", {"rank": 49}, "rank", "has only 48 singular vectors"),
        ("pica", {"targets": ["self_attn.q_proj", "q_proj"]}, "targets", "belong to an earlier target"),
        ("pica", {"targets": ["layers.0.self_attn.q_proj", "head"]}, "targets", "no layer of the model is called head"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name: str, options: Any, field: str, reason: str) -> None:
    model = tiny_model()
    with pytest.raises(InvalidRequest, match=reason) as caught:
        make_method(name, **options).attach(model, seed=0, total_steps=10)
    assert caught.value.field == field
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny_model().modules()}


def test_targets_may_be_full_names(tmp_path: Path) -> None:
    targets = ["model.layers.1.self_attn.q_proj", "lm_head", "layers.0.mlp.up_proj"]
    for name in METHODS:
        model = tiny_model()
        tuned = small_method(name, targets=targets, **({"d": 2} if name == "dcft" else {})).attach(
            model, seed=0, total_steps=10
        )
        assert set(tuned.deltas()) == {"model.layers.1.self_attn.q_proj", "lm_head", "model.layers.0.mlp.up_proj"}
        tuned.save(tmp_path / name, "example/tiny")
        base = base_of(tiny_model())
        parsed = parse_adapter(adapter_files(tmp_path / name), ParserContext(base, projectors=Projectors(None, base)))
        assert set(parsed.deltas) == set(tuned.deltas())


def test_state_of_something_else_is_refused() -> None:
    state = small_method("loca").attach(tiny_model(), seed=0, total_steps=100).state()
    for method, model, field in (
        (small_method("sdctft"), tiny_model(), "method"),
        (small_method("loca", n=31), tiny_model(), "n"),
        (small_method("loca", scale=0.8), tiny_model(), "scale"),
        (small_method("loca", location_steps=39), tiny_model(), "location_steps"),
        (small_method("loca", targets=["q_proj"]), tiny_model(), "targets"),
        (small_method("loca"), tiny_model(seed=1), "base"),
    ):
        tuned = method.attach(model, seed=0, total_steps=100)
        before = tuned.state()
        with pytest.raises(InvalidRequest) as caught:
            tuned.restore(state)
        assert caught.value.field == field
        assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state().items())
    tuned = small_method("loca").attach(tiny_model(), seed=0, total_steps=100)
    first = next(name for name in state if name.endswith("values"))
    for broken, field in (
        ({k: v for k, v in state.items() if k != first}, first),
        ({**state, "more": torch.zeros(1)}, "more"),
        ({**state, first: state[first][1:]}, first),
        ({**state, first: state[first].double()}, first),
        ({}, "settings"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            tuned.restore(broken)
        assert caught.value.field == field
