"""Six methods on one model: they start at the base, do what their deltas say, and their folders are read as that."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.kernels import reference
from overtone.tuning.methods import METHODS
from support.adapters import adapter_files
from support.oracle_folder import folder_deltas
from support.peft_base import base_of
from support.reference import MergedReference
from support.tiny import tiny_model
from support.tuned import TARGETS, adam, loss_of, loss_value, parameters_of, perturb, small_method, tokens, train

RELATIVE = 3e-6


@functools.cache
def _clean() -> Any:
    return tiny_model()


def _layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in TARGETS}


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got.double() - expected.double()).norm()) <= RELATIVE * float(expected.double().norm())


@pytest.mark.parametrize("name", METHODS)
def test_training_starts_at_the_base(name: str) -> None:
    model, ids = tiny_model(), tokens()
    before = loss_value(model, ids)
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    assert loss_value(model, ids) == before
    trained = {id(parameter) for parameter in parameters_of(tuned)}
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learning == trained
    assert tuned.trainable_parameters == sum(p.numel() for p in model.parameters() if id(p) in trained)


@pytest.mark.parametrize("name", METHODS)
def test_adapted_layers_do_what_the_deltas_say(name: str) -> None:
    model = tiny_model()
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    perturb(tuned)
    deltas = tuned.deltas()
    assert deltas.keys() == _layers(_clean()).keys()
    for module, layer in _layers(_clean()).items():
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            y = model.get_submodule(module)(x)
        assert deltas[module].dtype == torch.float32
        assert_near(y, layer(x) + x @ deltas[module].T)


@pytest.mark.parametrize("name", METHODS)
def test_folder_is_parsed_as_the_deltas(name: str, tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1)
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    perturb(tuned)
    tuned.save(tmp_path / "adapter", "example/tiny")
    base = base_of(_clean())
    parsed = parse_adapter(
        adapter_files(tmp_path / "adapter"), ParserContext(base, projectors=Projectors(None, base)), strict_base=True
    )
    linears = {n: m.weight for n, m in _clean().named_modules() if isinstance(m, nn.Linear)}
    by_definition = folder_deltas(tmp_path / "adapter", linears, {})
    assert parsed.family == name
    assert parsed.deltas.keys() == by_definition.keys() == tuned.deltas().keys()
    for module, delta in tuned.deltas().items():
        assert_near(delta, by_definition[module])
        assert_near(reference.dense_delta(parsed.deltas[module]), by_definition[module])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    expected = MergedReference(_clean()).logits(tmp_path / "adapter", ids[0].tolist())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_restored_training_goes_on_identically(name: str) -> None:
    """In a model to which the method was attached with another seed: all that was drawn is in the state."""
    model = tiny_model()
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    optimiser = adam(tuned)
    train(model, tuned, optimiser, range(12))
    state, moments = tuned.state(), optimiser.state_dict()
    moments = {**moments, "state": {k: {n: t.clone() for n, t in v.items()} for k, v in moments["state"].items()}}
    train(model, tuned, optimiser, range(12, 20))

    again = tiny_model()
    resumed = small_method(name).attach(again, seed=2, total_steps=100)
    resumed.restore(state)
    optimiser = adam(resumed)
    optimiser.load_state_dict(moments)
    train(again, resumed, optimiser, range(12, 20))
    for (key, expected), (other, got) in zip(tuned.state().items(), resumed.state().items(), strict=True):
        assert key == other
        assert torch.equal(got, expected), key
    assert any(not torch.equal(tensor, tuned.state()[key]) for key, tensor in state.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = tiny_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned = small_method(name).attach(model, seed=1, total_steps=100)
        perturb(tuned)
        loss_of(model, tokens()).backward()
        return [p.grad for p in parameters_of(tuned) if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 0
    for got, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(got, expected)
        assert bool(got.any())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_model_is_adapted_in_float32(name: str) -> None:
    model, ids = tiny_model(dtype=torch.bfloat16), tokens()
    before = loss_value(model, ids)
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    assert loss_value(model, ids) == before
    perturb(tuned)
    loss_of(model, ids).backward()
    for parameter in parameters_of(tuned):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    deltas = tuned.deltas()
    for module, layer in _layers(tiny_model(dtype=torch.bfloat16)).items():
        x = torch.randn(1, 5, layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            y, expected = model.get_submodule(module)(x), layer(x).float() + x.float() @ deltas[module].T
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["loca", "sdctft", "dcft", "pica"])
def test_autocast_leaves_the_branch_alone(name: str) -> None:
    model = tiny_model()
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    perturb(tuned)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 64)

    def branch(autocast: bool) -> list[torch.Tensor]:
        layer.zero_grad()
        outputs: list[torch.Tensor] = []
        hook = layer.branch.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        hook.remove()
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        (y * torch.arange(96).to(y.dtype)).sum().backward()  # small integers, which bfloat16 holds
        return [*outputs, *(p.grad.clone() for p in layer.branch.parameters() if p.grad is not None)]

    plain, cast = branch(False), branch(True)
    assert len(plain) > 1
    for got, expected in zip(cast, plain, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", METHODS)
def test_detached_model_is_the_base_again(name: str, tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens()
    tuned = small_method(name).attach(model, seed=1, total_steps=100)
    perturb(tuned)
    tuned.detach()
    assert loss_value(model, ids) == loss_value(_clean(), ids)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in _clean().named_modules()}
    small_method("lora").attach(model, seed=1, total_steps=100)
