"""`overtone tune` from the shell's side: what it makes, what it prints, what it refuses, and that it is there."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from overtone.api.cli import main
from overtone.tuning.config import LEARNING_RATES, TuneConfig, settings
from overtone.tuning.methods import METHODS
from support.adapters import adapter_files
from support.server import ThreadServer
from support.tiny import tiny_base
from support.tuning import pairs, save_tiny, write_lines


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    write_lines(folder / "train.jsonl", pairs(12))
    write_lines(folder / "eval.jsonl", pairs(4))
    return folder


def run(place: Path, out: Path, *arguments: str, data: str = "train.jsonl") -> Result:
    fixed = ["--model", str(place / "model"), "--data", str(place / data), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(main, ["tune", *fixed, *arguments], catch_exceptions=False)


BUDGETS: dict[str, list[str]] = {
    "loca": ["--coefficients", "40", "--scale", "2"],
    "sdctft": ["--coefficients", "40"],
    "dcft": ["--kernel-size", "4", "--rank", "2"],
    "pica": ["--rank", "4"],
    "lora": ["--rank", "2", "--alpha", "4", "--dropout", "0.1"],
    "fourierft": ["--coefficients", "40"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_end_to_end(place: Path, tmp_path: Path, method: str) -> None:
    arguments = ["--method", method, "--steps", "6", "--lr", "0.02", "--eval-data", str(place / "eval.jsonl"), "--json"]
    result = run(place, tmp_path / "out", *BUDGETS[method], *arguments)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["steps"] == 6
    assert made["eval_loss"] < made["eval_loss_before"]
    assert adapter_files(Path(made["adapter"])).config
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["method"]["name"] == method


def test_the_adapter_answers_in_a_server(place: Path, tmp_path: Path) -> None:
    """Tuned to one answer, loaded over the socket into a running server, asked there."""
    lines = [{"prompt": f"the hen {n}:", "completion": " in error"} for n in range(8)]
    write_lines(tmp_path / "train.jsonl", lines)
    arguments = ["--coefficients", "300", "--epochs", "25", "--lr", "0.1", "--schedule", "cosine", "--dtype", "float32"]
    targets = [part for name in ("q_proj", "v_proj", "o_proj", "down_proj") for part in ("--target", name)]
    made = run(place, tmp_path / "out", *arguments, *targets, data=str(tmp_path / "train.jsonl"))
    assert made.exit_code == 0, made.output
    with ThreadServer(tmp_path / "store", tiny_base()) as server, server.client() as client:
        before = client.generate("the hen 3:", max_new_tokens=8)
        client.adapters.load(tmp_path / "out" / "adapter", id="hen")
        after = client.generate("the hen 3:", adapter="hen", max_new_tokens=8)
    assert before.text != " in error"
    assert after.text == " in error"
    assert after.finish_reason == "eos"


def test_what_is_printed(place: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [*pairs(6), "nonsense", {"prompt": "a", "completion": "x" * 99}])
    arguments = ["--method", "lora", "--epochs", "1", "--malformed", "skip", "--too-long", "truncate"]
    result = run(place, tmp_path / "out", *arguments, "--max-length", "50", data=str(bad))
    assert result.exit_code == 0, result.output
    assert f"left out: 1 lines, bad_json; the first: {bad}:7: not JSON" in result.stdout
    assert "cut to max_length: 1 samples" in result.stdout
    assert str(tmp_path / "out" / "adapter") in result.stdout
    assert result.stderr == ""  # no bar where there is no terminal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora", "--coefficients", "3"], "lora has no coefficients"),
        (["--method", "loca", "--set", "learn_location=false"], "did you mean learn_locations"),
        (["--method", "loca", "--set", "n"], "KEY=VALUE"),
        (["--method", "loca", "--coefficients", "0"], "n must be a whole number >= 1, not 0"),
        (["--method", "dcft", "--kernel-size", "5"], "5"),
        (["--target", "nothing"], "nothing"),
        (["--steps", "3", "--epochs", "1"], "not both"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--patience", "2"], "patience needs an evaluation set"),
        (["--max-length", "4000"], "more than the model's context"),
    ],
)
def test_refusals_are_one_line(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(place, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_fields_of_methods_that_have_no_option(place: Path, tmp_path: Path) -> None:
    changes = ["--set", "learn_locations=false", "--set", 'targets=["o_proj"]', "--coefficients", "9", "--steps", "1"]
    assert run(place, tmp_path / "out", *changes).exit_code == 0
    method = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["method"]
    assert method == method | {"learn_locations": False, "targets": ["o_proj"], "n": 9}


def test_every_setting_is_an_option() -> None:
    help_text = CliRunner().invoke(main, ["tune", "--help"]).output
    assert all(f"--{each.name.replace('_', '-')}" in help_text for each in fields(TuneConfig))
    assert len(settings()) == len(fields(TuneConfig)) - 4  # data, eval_data, method and out are options of their own


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without_peft(name: str, *rest: Any) -> Any:
        return None if name == "peft" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_peft)
    result = CliRunner().invoke(main, ["tune", "--data", "x", "--out", "y"])
    assert result.exit_code == 1
    assert result.stderr == "Error: `overtone tune` needs peft, which is not installed: pip install 'overtone[tune]'\n"
    assert "tune" in CliRunner().invoke(main, ["--help"]).output


def test_the_page_has_every_setting() -> None:
    """With its default, so that a change to one is a change to the other."""
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    for each in settings():
        default = "" if each.default is None else str(each.default)
        default = default.lower() if isinstance(each.default, bool) else default
        assert f"| `{each.name}` | {default} | {each.metadata['help'].rstrip('.')}" in page, each.name
    for name, rate in LEARNING_RATES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert float(row.split("|")[4]) == rate
