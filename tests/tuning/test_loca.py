"""LoCA's schedule, what each phase leaves alone, and how its locations reach the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters import ParserContext, parse_adapter
from overtone.tuning.methods import LocaMethod
from overtone.tuning.methods.loca import TunedLoca, coefficients_learn
from overtone.tuning.methods.spectrum import decode
from support.adapters import adapter_files
from support.peft_base import base_of
from support.tiny import tiny_model
from support.tuned import adam, loss_of, perturb, small_method, tokens, train


def _attach(model: Any, *, total_steps: int = 100, **options: Any) -> TunedLoca:
    tuned = small_method("loca", **options).attach(model, seed=1, total_steps=total_steps)
    assert isinstance(tuned, TunedLoca)
    return tuned


def test_phases_of_the_schedule() -> None:
    coefficients = [step for step in range(100) if coefficients_learn(step, 75)]
    assert coefficients == [*range(10), *range(30, 40), *range(60, 70), *range(75, 100)]
    assert all(coefficients_learn(step, 0) for step in range(100))
    # Step 0 belongs to the coefficients, which are zero before it, whatever the number of location steps.
    assert coefficients_learn(0, 1)


def test_a_tenth_of_all_steps_moves_locations() -> None:
    method = LocaMethod(n=5)
    assert method.attach(tiny_model(), seed=0, total_steps=1234).location_steps == 123
    assert LocaMethod(n=5, location_steps=7).attach(tiny_model(), seed=0, total_steps=1234).location_steps == 7
    fixed = LocaMethod(n=5, learn_locations=False, location_steps=7)
    assert fixed.attach(tiny_model(), seed=0, total_steps=1234).location_steps == 0


def test_what_does_not_learn_does_not_move() -> None:
    """Not by its gradient, its moments or weight decay."""
    model = tiny_model()
    tuned = _attach(model, location_steps=40)
    coefficients, locations = tuned.groups
    optimiser = adam(tuned)
    for first, learning, resting in (
        (0, coefficients, locations),
        (10, locations, coefficients),
        (30, coefficients, locations),
        (40, coefficients, locations),
    ):
        before = {group.name: [p.detach().clone() for p in group.parameters] for group in tuned.groups}
        moments = [dict(optimiser.state[p]) for p in resting.parameters]
        train(model, tuned, optimiser, range(first, first + 3))
        for group, moved in ((learning, True), (resting, False)):
            for parameter, old in zip(group.parameters, before[group.name], strict=True):
                assert parameter.requires_grad == moved
                assert torch.equal(parameter, old) != moved
        assert all(parameter.grad is None for parameter in resting.parameters)
        assert moments == [dict(optimiser.state[p]) for p in resting.parameters]


def test_only_what_ever_learns_is_trainable() -> None:
    layers, n = 6, 30
    assert _attach(tiny_model()).trainable_parameters == 3 * n * layers
    assert _attach(tiny_model(), learn_locations=False).trainable_parameters == n * layers
    # The first turn of the locations is at step 10.
    assert _attach(tiny_model(), location_steps=10).trainable_parameters == n * layers
    assert _attach(tiny_model(), location_steps=11).trainable_parameters == 3 * n * layers


def test_locations_have_their_own_learning_rate_and_no_decay() -> None:
    coefficients, locations = _attach(tiny_model(), location_lr=3e-4).groups
    assert (coefficients.lr, coefficients.weight_decay) == (None, None)
    assert (locations.lr, locations.weight_decay) == (3e-4, 0.0)


def test_locations_are_uniform_and_of_the_seed() -> None:
    first, same, other = (
        LocaMethod(n=400).attach(tiny_model(), seed=seed, total_steps=1).state() for seed in (1, 1, 2)
    )
    names = [name for name in first if name.endswith("locations")]
    drawn = torch.cat([first[name] for name in names], dim=1)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    counts = torch.histc(drawn, 10, 0, 1)
    assert float((counts - counts.mean()).abs().max()) < 5 * float(counts.mean().sqrt())
    assert len(drawn[0].unique()) > 0.99 * drawn.shape[1]
    for name in names:
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])


def test_locations_outside_are_stored_as_what_they_decode_to(tmp_path: Path) -> None:
    model = tiny_model()
    tuned = _attach(model)
    perturb(tuned, strength=0.5)
    _, locations = tuned.groups
    assert any(bool((t < 0).any()) and bool((t > 1).any()) for t in locations.parameters)
    expected = {}
    for name, t in zip(tuned.deltas(), locations.parameters, strict=True):
        shape = base_of(tiny_model()).shape(name)
        expected[name] = {tuple(place) for place in decode(t, shape).T.tolist()}
    tuned.save(tmp_path, "example/tiny")
    parsed = parse_adapter(adapter_files(tmp_path), ParserContext(base_of(tiny_model())))
    for name, delta in parsed.deltas.items():
        core: Any = delta.terms[0].core
        stored = zip(core.rows.tolist(), core.cols.tolist(), core.values.tolist(), strict=True)
        assert {(row, col) for row, col, value in stored if value} == expected[name]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["scale"] == 0.7
    assert config["n_frequency"] == 30
    assert config["learn_location_iter"] == 40
    assert config["base_model_name_or_path"] == "example/tiny"


@pytest.mark.parametrize("learn", [True, False])
def test_training_lowers_the_loss(learn: bool) -> None:
    model, ids = tiny_model(), tokens()
    tuned = _attach(model, n=200, learn_locations=learn)
    optimiser = adam(tuned, lr=0.03)
    losses = []
    for step in range(50):
        tuned.begin_step(step)
        loss = loss_of(model, ids)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["loca", "dcft", "lora"])
def test_dropout_is_of_the_branch_and_of_training_only(name: str) -> None:
    """Also in a model that was attached to while it was not training."""
    model = tiny_model()
    layer = "model.layers.0.self_attn.q_proj"
    clean, x = tiny_model().get_submodule(layer), torch.randn(4, 64)
    perturb(small_method(name, dropout=0.5).attach(model, seed=1, total_steps=100))
    adapted = model.get_submodule(layer)
    with torch.no_grad():
        assert torch.equal(adapted(x), adapted(x))
        once, twice = adapted.train()(x), adapted(x)
        assert not torch.equal(once, twice)
        assert torch.equal(adapted(torch.zeros(1, 64)), clean(torch.zeros(1, 64)))
