"""An interrupted run that is resumed is the run that was not, to the last bit; and nothing else is resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.errors import InvalidRequest
from overtone.tuning import TuneResult, tune
from overtone.tuning.checkpoint import write_checkpoint
from overtone.tuning.conductor import Conductor
from overtone.tuning.methods import LocaMethod, LoraMethod
from overtone.tuning.run_folder import RunFolder
from support.tuning import FakeMethod, config_of, pairs, save_tiny, write_lines

STEPS = 11
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "save_every": 2,
    "accumulation": 2,
    "batch_size": 2,
    "shuffle": "buffer",
    "shuffle_buffer": 6,
    "malformed": "skip",
    "eval_every": 3,
    "schedule": "cosine",
    "weight_decay": 0.1,
}


class Killed(Exception): ...


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    items: list[Any] = list(pairs(17))
    items[3:3] = ["nonsense", "{}"]
    write_lines(folder / "train.jsonl", items)
    write_lines(folder / "eval.jsonl", pairs(3))
    return folder


def run(place: Path, out: Path, method: Any, **changes: Any) -> TuneResult:
    files = {"eval_data": place / "eval.jsonl"}
    return tune(config_of(place / "model", place / "train.jsonl", out, method, **(SETTINGS | files | changes)))


def dying(at: int) -> FakeMethod:
    def die(step: int) -> None:
        if step == at:
            raise Killed

    return FakeMethod(dropout=0.2, penalty=0.01, on_step=die)


def comparable(out: Path) -> tuple[Any, ...]:
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    for row in history:
        row.pop("seconds", None)
    record = json.loads((out / "run.json").read_text())
    for name in ("seconds", "made"):
        del record[name]
    return history, record, (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    run(place, place / "whole", FakeMethod(dropout=0.2, penalty=0.01))
    return place / "whole"


@pytest.mark.parametrize("at", [5, 10])
def test_resumed_is_uninterrupted(place: Path, whole: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(place, out, dying(at))
    assert not out.exists()
    resumed = FakeMethod(dropout=0.2, penalty=0.01)
    run(place, out, resumed, resume=True)
    assert resumed.made[-1].begun == list(range(at - at % 2, STEPS))
    assert comparable(out) == comparable(whole)


@pytest.mark.parametrize(
    ("method", "at"),
    [(LocaMethod(n=30, location_steps=40), 12), (LoraMethod(r=2, dropout=0.3), 5)],  # LoCA: among its locations' steps
    ids=["loca", "lora"],
)
def test_the_methods_resume(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, at: int) -> None:
    """Their random draws, their phases, and Adam's moments of what does not learn at the moment."""
    changes = {"steps": 16, "save_every": 1}
    run(place, tmp_path / "whole", method, **changes)
    recorded = Conductor._record

    def die(conductor: Conductor) -> None:
        recorded(conductor)
        if conductor.step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Conductor, "_record", die)
        with pytest.raises(Killed):
            run(place, tmp_path / "out", method, **changes)
    run(place, tmp_path / "out", method, resume=True, **changes)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")


def test_interrupted_again_and_again(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for at in (0, 9):
        with pytest.raises(Killed):
            run(place, out, dying(at), resume=True)
    run(place, out, dying(-1), resume=True)
    assert comparable(out) == comparable(whole)


def test_a_killed_process(place: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL at a random step, in its middle; no handler and no `finally` runs."""
    out, at = tmp_path / "out", random.randrange(3, STEPS)
    program = (
        "import os, pathlib, signal, sys, torch; torch.set_num_threads(1)\n"
        "import test_tune_resume as here\n"
        f"method = here.FakeMethod(dropout=0.2, penalty=0.01, on_step=lambda step: step == {at} and "
        "os.kill(os.getpid(), signal.SIGKILL))\n"
        f"here.run(pathlib.Path({str(place)!r}), pathlib.Path({str(out)!r}), method)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "out.partial" / "checkpoint.pt").exists()
    run(place, out, FakeMethod(dropout=0.2, penalty=0.01), resume=True)
    assert comparable(out) == comparable(whole), f"killed in step {at}"


def test_killed_after_the_last_step(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be trained, only to be saved."""
    changes = {"steps": 4, "save_every": 4}
    run(place, tmp_path / "whole", FakeMethod(), **changes)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", die)
        with pytest.raises(Killed):
            run(place, tmp_path / "out", FakeMethod(), **changes)
    late = FakeMethod()
    run(place, tmp_path / "out", late, resume=True, **changes)
    assert late.made[-1].begun == []
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")


def test_early_stopping_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    changes = {"lr": 2.0, "schedule": "constant", "warmup": 0, "patience": 3, "eval_every": 1, "steps": 40}
    first = run(place, tmp_path / "whole", FakeMethod(), **changes)
    assert first.stopped_early
    at = first.steps - 1
    with pytest.raises(Killed):
        run(place, tmp_path / "out", FakeMethod(on_step=dying(at).on_step), **changes)
    second = run(place, tmp_path / "out", FakeMethod(), resume=True, **changes)
    assert (second.steps, second.best_step) == (first.steps, first.best_step)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")


@pytest.fixture(scope="module")
def interrupted(place: Path) -> Path:
    with pytest.raises(Killed):
        run(place, place / "interrupted", dying(5))
    return place / "interrupted"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 0.01}, "lr"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"steps": 12}, "steps"),
        ({"schedule": "linear"}, "schedule"),
        ({"method": FakeMethod(dropout=0.2, penalty=0.02)}, "method.penalty"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_settings_are_refused(place: Path, interrupted: Path, changes: dict[str, Any], field: str) -> None:
    method = changes.pop("method", dying(-1))
    with pytest.raises(InvalidRequest, match=f"resume: {field} was ") as caught:
        run(place, interrupted, method, resume=True, **changes)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="is an interrupted run: resume it, or remove it") as caught:
        run(place, interrupted, method, **changes)
    assert caught.value.field == "out"


def test_other_data_and_another_base_are_refused(place: Path, interrupted: Path) -> None:
    kept = (place / "train.jsonl").read_text()
    try:
        write_lines(place / "train.jsonl", [*kept.splitlines(), json.dumps(pairs(1)[0])])
        with pytest.raises(InvalidRequest, match="resume: data was "):
            run(place, interrupted, dying(-1), resume=True)
    finally:
        (place / "train.jsonl").write_text(kept)
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        save_tiny(place / "model", seed=1)
        with pytest.raises(InvalidRequest, match="resume: base was "):
            run(place, interrupted, dying(-1), resume=True)
    finally:
        weights.write_bytes(before)


def test_a_run_that_is_still_running(place: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(step: int) -> None:
        if step == 3:
            with pytest.raises(InvalidRequest, match="another process is running") as caught:
                run(place, tmp_path / "out", FakeMethod(), resume=True, steps=4)
            refused.append(str(caught.value.field))

    run(place, tmp_path / "out", FakeMethod(on_step=start_another), steps=4)
    assert refused == ["out"]


def test_damaged_checkpoints(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(place, out, dying(3))
    checkpoint = tmp_path / "out.partial" / "checkpoint.pt"
    assert checkpoint.stat().st_size < 200_000  # the base alone is more
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(InvalidRequest, match="cannot be read") as caught:
        run(place, out, dying(-1), resume=True)
    assert caught.value.field == "resume"


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"step": 1})
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, {"step": 2})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
