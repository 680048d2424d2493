"""Every family of adapters as a source: against its dense deltas by PEFT, or by its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.errors import BaseModelMismatch, UnsupportedAdapter
from overtone.models.fingerprint import fingerprint_of
from overtone.tuning.compress import Config, Report, compress
from support.adapters import dense_delta
from support.all_families import FAMILIES
from support.compressing import DOWN1, Q0, SHAPES, V0, lora_folder, model_folder, random_pair, spectrum_of
from support.dense import deltas_in
from support.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")  # PEFT's, of save_projection=False

N = 150


@pytest.fixture(scope="module")
def model() -> Any:
    """To read only."""
    return tiny_model()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "model", model)


def run(source: Path, base: Path, **options: Any) -> tuple[Report, Path]:
    target = source.with_name(f"{source.name}-small")
    return compress(Config(source=source, target=target, model=str(base), **options)), target


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"dora"}))
def test_the_largest_coefficients_of_the_dense_delta(tmp_path: Path, base: Path, model: Any, name: str) -> None:
    source = FAMILIES[name](tmp_path / "source", model, [Q0, V0, DOWN1], 1.0)
    deltas = deltas_in(source, model)
    report, target = run(source, base, coefficients=N)
    best = energy = found = 0.0
    for module, delta in deltas.items():
        stored = dense_delta(target, module, (delta.shape[0], delta.shape[1]))
        assert stored is not None
        spectrum = spectrum_of(delta).flatten()
        energy += float(spectrum.square().sum())
        best += float(spectrum.abs().sort().values[:-N].square().sum())
        found += float((delta.double() - torch.as_tensor(stored)).square().sum())
    assert report.relative_error == pytest.approx(math.sqrt(found / energy), rel=1e-4, abs=1e-6)
    assert report.relative_error == pytest.approx(math.sqrt(best / energy), rel=1e-4, abs=1e-6)
    assert {each.name for each in report.modules} == set(deltas)
    assert set(deltas) <= set(SHAPES)


def test_dora_as_peft_saves_it_is_refused(tmp_path: Path, base: Path, model: Any) -> None:
    source = FAMILIES["dora"](tmp_path / "source", model, [Q0], 1.0)
    with pytest.raises(UnsupportedAdapter, match="DoRA") as caught:
        run(source, base, coefficients=N)
    assert caught.value.field == Q0


def test_a_fingerprint_is_checked_and_carried_over(tmp_path: Path, base: Path, model: Any) -> None:
    pairs, right = {Q0: random_pair(SHAPES[Q0], 2)}, fingerprint_of(model)
    _, target = run(lora_folder(tmp_path / "right", pairs, base_fingerprint=right), base, coefficients=N)
    assert json.loads((target / "adapter_config.json").read_text())["base_fingerprint"] == right
    with pytest.raises(BaseModelMismatch) as caught:
        run(lora_folder(tmp_path / "wrong", pairs, base_fingerprint="0" * 64), base, coefficients=N)
    assert caught.value.field == "base_fingerprint"
