"""The loop: what it minimises, what it leaves, when it stops, what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from overtone.adapters import ParserContext, parse_adapter
from overtone.errors import ConfigError, InvalidRequest
from overtone.kernels import reference
from overtone.tuning import TuneResult, finishing, tune
from overtone.tuning.data import Encoder, collate
from overtone.tuning.data.types import Place, RawLine
from overtone.tuning.history import plot_losses
from overtone.tuning.loss import SummedLoss, mean_loss
from support.adapters import adapter_files
from support.peft_base import base_of
from support.tiny import tiny_model, tiny_tokenizer
from support.tuning import FakeMethod, config_of, pairs, save_tiny, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "train.jsonl", pairs(14))


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "eval.jsonl", pairs(14))


def run(method: FakeMethod, model: Path, data: Any, out: Path, **changes: Any) -> TuneResult:
    return tune(config_of(model, data, out, method, **changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(
    model: Path, data: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "plot_losses", plot_losses)
    method = FakeMethod()
    result = run(method, model, data, tmp_path / "out", epochs=3, eval_data=held, schedule="constant")
    assert (result.steps, result.total_steps, result.stopped_early) == (15, 15, False)
    assert method.made[-1].begun == list(range(15))
    assert result.eval_loss_before is not None
    assert result.eval_loss is not None
    assert result.eval_loss < result.eval_loss_before - 0.5
    assert sorted(each.name for each in result.folder.iterdir()) == ["adapter", "history.jsonl", "loss.png", "run.json"]
    assert not (tmp_path / "out.partial").exists()
    record = json.loads((result.folder / "run.json").read_text())
    assert record["samples"] == 14
    assert record["trainable_parameters"] == method.made[-1].trainable_parameters == result.trainable_parameters
    assert record["adapter_bytes"] == sum(each.stat().st_size for each in result.adapter.iterdir())
    assert record["settings"]["method"] == {"name": "fake", "rank": 2, "targets": ["q_proj", "v_proj"]} | {
        "dropout": 0.0,
        "penalty": 0.0,
    }
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or record["versions"]["torch"]
    history = rows(result.folder)
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 16))
    assert history[0] == {"step": 0, "eval_loss": result.eval_loss_before}
    assert record["eval_loss"] == [row["eval_loss"] for row in history if "eval_loss" in row][-1]


def test_the_adapter_loads_and_is_what_was_tuned(model: Path, data: Path, tmp_path: Path) -> None:
    method = FakeMethod()
    result = run(method, model, data, tmp_path / "out", steps=4)
    base = base_of(AutoModelForCausalLM.from_pretrained(model), str(model))
    parsed = parse_adapter(adapter_files(result.adapter), ParserContext(base))
    deltas = method.made[-1].deltas()
    assert parsed.deltas.keys() == deltas.keys()
    for name, delta in parsed.deltas.items():
        torch.testing.assert_close(reference.dense_delta(delta).float(), deltas[name], rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_transformers(model: Path) -> None:
    """In float64, with logits at chosen places only, and summed over batches."""
    base = tiny_model(dtype=torch.float64)
    encoder = Encoder(tiny_tokenizer(), max_length=64, too_long="error")
    samples = [encoder.sample(RawLine(Place("t", n), item)) for n, item in enumerate(pairs(7))]
    whole = collate(samples, 0)
    logits = base(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), whole["labels"][:, 1:].flatten(), ignore_index=-100)
    parts = [collate(samples[:2], 0), collate(samples[2:], 0)]
    summed = SummedLoss(base)
    assert mean_loss(base, summed, [whole], torch.device("cpu")) == pytest.approx(float(expected), rel=1e-6)
    assert mean_loss(base, summed, parts, torch.device("cpu")) == pytest.approx(float(expected), rel=1e-6)
    summed._keeps = False
    assert mean_loss(base, summed, parts, torch.device("cpu")) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("changes", [{"batch_size": 2, "accumulation": 3}, {"batch_size": 1, "accumulation": 6}])
def test_accumulated_batches_are_one_large_batch(model: Path, data: Path, tmp_path: Path, changes: Any) -> None:
    """Samples differ in length: a mean of means would not be the mean."""
    common: dict[str, Any] = {"steps": 5, "shuffle": "none", "weight_decay": 0.1}
    large, small = FakeMethod(penalty=0.01), FakeMethod(penalty=0.01)
    run(large, model, data, tmp_path / "large", batch_size=6, **common)
    run(small, model, data, tmp_path / "small", **common, **changes)
    for one, other in zip(rows(tmp_path / "large"), rows(tmp_path / "small"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["learned_tokens"] == other["learned_tokens"]
    for name, tensor in large.last_state.items():
        torch.testing.assert_close(tensor, small.last_state[name], rtol=1e-3, atol=2e-4)


def test_a_step_by_hand(model: Path, tmp_path: Path) -> None:
    """One step of AdamW on the loss and the penalty, with the groups' own rates and the schedule."""
    items = pairs(3)
    method = FakeMethod(penalty=0.5)
    run(method, model, items, tmp_path / "out", steps=3, shuffle="none", warmup=0, max_grad_norm=0.1, weight_decay=0.2)
    model_ = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = FakeMethod(penalty=0.5).attach(model_, seed=0, total_steps=3)
    groups: list[dict[str, Any]] = [
        {"params": list(tuned.groups[0].parameters), "lr": 0.05, "weight_decay": 0.2},
        {"params": list(tuned.groups[1].parameters), "lr": 0.01, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    encoder = Encoder(tiny_tokenizer(), max_length=64, too_long="error")
    batch = collate([encoder.sample(RawLine(Place("t", n), item)) for n, item in enumerate(items)], 0)
    for step in range(3):
        for group, rate in zip(optimizer.param_groups, (0.05, 0.01), strict=True):
            group["lr"] = rate * (3 - step) / 3
        tuned.begin_step(step)
        loss = model_(**batch).loss + tuned.penalty()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 0.1)
        optimizer.step()
    for name, tensor in tuned.state().items():
        torch.testing.assert_close(tensor.detach(), method.last_state[name], rtol=1e-4, atol=1e-5)
    history = rows(tmp_path / "out")
    assert [row["lr"] for row in history] == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3])
    assert history[1]["penalty"] > 0


def test_early_stopping_keeps_the_best(model: Path, data: Path, held: Path, tmp_path: Path) -> None:
    """A rate far too high: the loss falls first and rises then."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    method = FakeMethod(on_step=lambda step: states.__setitem__(step, method.last_state))
    changes: dict[str, Any] = {"eval_data": held, "eval_every": 1, "lr": 1.0, "schedule": "constant", "warmup": 0}
    result = run(method, model, data, tmp_path / "out", steps=40, patience=3, **changes)
    losses = [row["eval_loss"] for row in rows(result.folder) if "eval_loss" in row]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert result.stopped_early
    assert result.steps == best + 3 == len(losses) - 1
    assert (result.best_step, result.eval_loss) == (best, losses[best])
    for name, tensor in method.last_state.items():
        assert tensor.equal(states[best][name])


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_steps_that_are_not_finite(model: Path, data: Path, tmp_path: Path, nonfinite: str) -> None:
    before: dict[str, torch.Tensor] = {}

    def spoil(step: int) -> None:
        up = method.made[-1].layers["model.layers.0.self_attn.q_proj"].up
        if step == 2:
            before.update(method.last_state)
            up.data[0, 0] = torch.nan
        if step == 3:
            changed = [name for name, t in method.last_state.items() if not t.equal(before[name])]
            assert changed == ["model.layers.0.self_attn.q_proj.up"]
            up.data[0, 0] = before["model.layers.0.self_attn.q_proj.up"][0, 0]

    method = FakeMethod(on_step=spoil)
    changes: dict[str, Any] = {"steps": 5, "nonfinite": nonfinite, "shuffle": "none"}
    if nonfinite == "error":
        places = ", ".join(f"{data}:{line}" for line in (7, 8, 9))
        with pytest.raises(InvalidRequest, match="step 3: the loss is nan, on ") as caught:
            run(method, model, data, tmp_path / "out", **changes)
        assert places in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    result = run(method, model, data, tmp_path / "out", **changes)
    assert (result.steps, result.nonfinite_steps) == (5, 1)
    assert [row["loss"] is None for row in rows(result.folder)] == [False, False, True, False, False]


def test_skipped_steps_are_bounded(model: Path, data: Path, tmp_path: Path) -> None:
    def spoil(step: int) -> None:
        method.made[-1].layers["model.layers.0.self_attn.q_proj"].up.data[0, 0] = torch.inf

    method = FakeMethod(on_step=spoil)
    with pytest.raises(InvalidRequest, match=r"step 4: .* more than nonfinite_limit \(3\)") as caught:
        run(method, model, data, tmp_path / "out", steps=9, nonfinite="skip", nonfinite_limit=3)
    assert caught.value.field == "nonfinite_limit"


def test_an_adapter_with_nan_is_never_kept(model: Path, data: Path, tmp_path: Path) -> None:
    def spoil(step: int) -> None:
        method.made[-1].layers["model.layers.1.self_attn.v_proj"].up.data[0, 0] = torch.nan

    method = FakeMethod(on_step=spoil)
    with pytest.raises(InvalidRequest, match=r"v_proj\.up is not finite"):
        run(method, model, data, tmp_path / "out", steps=2, nonfinite="skip")
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_gives_the_same(model: Path, data: Path, tmp_path: Path) -> None:
    methods = [FakeMethod(dropout=0.2), FakeMethod(dropout=0.2)]
    for number, method in enumerate(methods):
        run(method, model, data, tmp_path / f"{number}", steps=4, gradient_checkpointing=bool(number))
    for name, tensor in methods[0].last_state.items():
        assert tensor.equal(methods[1].last_state[name])


def test_the_base_may_be_bfloat16(model: Path, data: Path, held: Path, tmp_path: Path) -> None:
    method = FakeMethod()
    result = run(method, model, data, tmp_path / "out", epochs=3, dtype="bfloat16", eval_data=held)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    assert json.loads((result.folder / "run.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_the_process_keeps_its_random_state(model: Path, data: Path, tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(1))

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    run(FakeMethod(dropout=0.5), model, data, tmp_path / "out", steps=2)
    assert drawn() == expected


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"steps": 1, "epochs": 1}, "steps", "not both"),
        ({"epochs": 0}, "epochs", "more than 0"),
        ({"lr": -1.0}, "lr", "more than 0"),
        ({"lr": float("nan")}, "lr", "finite"),
        ({"batch_size": 0}, "batch_size", "at least 1"),
        ({"batch_size": 2.5}, "batch_size", "must be int"),
        ({"batch_size": True}, "batch_size", "must be int"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"schedule": "step"}, "schedule", "one of constant, linear, cosine"),
        ({"warmup": 1.5}, "warmup", "whole number"),
        ({"warmup": 5, "steps": 5}, "warmup", "less than steps"),
        ({"patience": 2}, "patience", "needs an evaluation set"),
        ({"eval_every": 2}, "eval_every", "needs an evaluation set"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "eval_fraction", "not both"),
        ({"eval_data": "train.jsonl"}, "eval_data", "learned from"),
        ({"model": ""}, "model", "empty"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing", "must be bool"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        config_of(Path("x"), "train.jsonl", tmp_path / "out", **changes)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_what_does_not_fit_the_model_or_the_place(model: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"max_length \(513\) is more than the model's context \(512\)"):
        run(FakeMethod(), model, data, tmp_path / "out", max_length=513)
    with pytest.raises(InvalidRequest, match="no layer is called nothing"):
        run(FakeMethod(targets=("nothing",)), model, data, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        run(FakeMethod(), tmp_path, data, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidRequest, match="exists already") as caught:
        run(FakeMethod(), model, data, tmp_path / "there")
    assert caught.value.field == "out"
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidRequest, match="is in the way and is not a run"):
        run(FakeMethod(), model, data, tmp_path / "mine", resume=True)
    assert (tmp_path / "mine.partial" / "thesis.tex").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidRequest, match="one process"):
        run(FakeMethod(), model, data, tmp_path / "b")
