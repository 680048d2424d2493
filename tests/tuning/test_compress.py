"""Compressions from folder to folder: against dense deltas by their definition, and as a server loads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overtone.errors import InvalidRequest
from overtone.tuning.compress import Config, Report, calibrate, compress
from overtone.tuning.compress.moments import in_parts
from support.adapters import adapter_files, dense_delta, parse
from support.compressing import (
    DOWN1,
    Q0,
    SHAPES,
    V0,
    Pair,
    delta_of,
    lora_folder,
    model_folder,
    planted_pair,
    random_pair,
    smooth_pair,
    spectrum_of,
)
from support.peft_base import base_of
from support.reference import MergedReference
from support.server import ThreadServer
from support.tiny import tiny_model, tiny_tokenizer

PLACES = [(3, 5), (40, 0), (0, 63), (17, 17)]
VALUES = [1.5, -2.0, 0.75, 0.5]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "model")


def pairs_of(make: Any, rank: int) -> dict[str, Pair]:
    return {module: make(shape, rank, seed) for seed, (module, shape) in enumerate(SHAPES.items())}


def run(source: Path, base: Path, **options: Any) -> tuple[Report, Path]:
    target = source.with_name(f"{source.name}-small")
    return compress(Config(source=source, target=target, model=str(base), **options)), target


def error_of(target: Path, deltas: dict[str, torch.Tensor]) -> float:
    """||delta_W - stored||_F / ||delta_W||_F over all modules, dense."""
    error = energy = 0.0
    for module, delta in deltas.items():
        found = dense_delta(target, module, (delta.shape[0], delta.shape[1]))
        left = delta.double() if found is None else delta.double() - torch.as_tensor(found)
        error, energy = error + float(left.square().sum()), energy + float(delta.double().square().sum())
    return math.sqrt(error / energy)


def dense(pairs: dict[str, Pair], scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {module: b.double() @ a.double() * scale for module, (b, a) in pairs.items()}


@pytest.mark.parametrize("family", ["loca", "sdctft"])
def test_what_is_sparse_in_the_plane_comes_back_exact(tmp_path: Path, base: Path, family: str) -> None:
    pair = planted_pair(SHAPES[Q0], PLACES, VALUES)
    report, target = run(lora_folder(tmp_path / "lora", {Q0: pair}), base, coefficients=4, family=family)
    core = parse(*_bytes(target), base_of(tiny_model())).deltas[Q0].terms[0].core
    found = {(int(r), int(c)): float(v) for r, c, v in zip(core.rows, core.cols, core.values, strict=True)}
    assert found == pytest.approx(dict(zip(PLACES, VALUES, strict=True)), rel=1e-6)
    assert report.relative_error < 1e-6
    assert report.verdict == "compresses"


@pytest.mark.parametrize("family", ["loca", "sdctft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_folder_has_exactly_the_chosen(tmp_path: Path, base: Path, family: str, dtype: str) -> None:
    pairs = pairs_of(random_pair, 4)
    source = lora_folder(tmp_path / "lora", pairs, alpha=6)
    report, target = run(source, base, coefficients=50, family=family, dtype=dtype)
    deltas = dense(pairs, scale=1.5)
    parsed = parse(*_bytes(target), base_of(tiny_model()))
    assert parsed.deltas.keys() == deltas.keys()
    for module, delta in deltas.items():
        spectrum = spectrum_of(delta).flatten()
        places = spectrum.abs().topk(50).indices.sort().values
        core = parsed.deltas[module].terms[0].core
        assert (core.rows.long() * delta.shape[1] + core.cols).tolist() == places.tolist()
        expected = spectrum[places].to(getattr(torch, dtype))
        torch.testing.assert_close(core.values, expected.float(), rtol=1e-6 if dtype == "float32" else 1e-2, atol=0)
    assert report.relative_error == pytest.approx(error_of(target, deltas), rel=1e-6)
    by_name = {each.name: each for each in report.modules}
    for module, delta in deltas.items():
        each = by_name[module]
        assert (each.shape, each.coefficients) == (tuple(delta.shape), 50)
        assert each.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert each.relative_error == pytest.approx(error_of(target, {module: delta}), rel=1e-6)
    assert report.bytes_in == sum(path.stat().st_size for path in source.iterdir())
    assert report.bytes_out == sum(path.stat().st_size for path in target.iterdir())


def _bytes(folder: Path) -> tuple[bytes, bytes]:
    files = adapter_files(folder)
    return files.config, files.weights


@pytest.mark.parametrize("error", [0.5, 0.05])
def test_an_error_is_met_by_the_dense_deltas(tmp_path: Path, base: Path, error: float) -> None:
    pairs = pairs_of(smooth_pair, 3)
    report, target = run(lora_folder(tmp_path / "lora", pairs), base, error=error)
    assert error_of(target, dense(pairs)) <= error
    together = torch.cat([spectrum_of(delta).flatten() for delta in dense(pairs).values()])
    kept = together.abs().sort().values[: -(report.coefficients - 1) or None]
    assert float(kept.norm() / together.norm()) > error


def test_a_total_goes_where_the_energy_is(tmp_path: Path, base: Path) -> None:
    pairs = pairs_of(random_pair, 3)
    pairs[V0] = (pairs[V0][0] * 1e-6, pairs[V0][1])
    report, target = run(lora_folder(tmp_path / "lora", pairs), base, total=120)
    together = torch.cat([spectrum_of(delta).flatten() for delta in dense(pairs).values()])
    assert report.coefficients == 120
    expected = together.abs().sort().values[:-120].norm() / together.norm()
    assert report.relative_error == pytest.approx(float(expected), rel=1e-6)
    tensors = load_file(target / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rpartition(".")[0] for name in tensors} == {Q0, DOWN1}
    assert {each.name: each.coefficients for each in report.modules}[V0] == 0


@pytest.mark.parametrize("allowed", [1500, 4000, 10_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_used_and_not_exceeded(tmp_path: Path, base: Path, allowed: int, dtype: str) -> None:
    source = lora_folder(tmp_path / "lora", pairs_of(random_pair, 8))
    report, target = run(source, base, bytes=allowed, dtype=dtype)
    used = sum(path.stat().st_size for path in target.iterdir())
    assert allowed - 32 < used <= allowed
    assert report.bytes_out == used


def test_bands_take_a_third_each(tmp_path: Path, base: Path) -> None:
    pairs = {Q0: random_pair(SHAPES[Q0], 4)}
    report, target = run(lora_folder(tmp_path / "lora", pairs), base, coefficients=31, bands=True, family="sdctft")
    rows, cols = load_file(target / "adapter_model.safetensors")[f"base_model.model.{Q0}.indices"].long()
    thirds = (rows**2 + cols**2).sqrt() * 3 / math.hypot(95, 63)
    assert [int(((thirds > i) & (thirds <= i + 1)).sum()) + (i == 0) * int((thirds == 0).sum()) for i in range(3)] == [
        11,
        10,
        10,
    ]
    assert report.relative_error == pytest.approx(error_of(target, dense(pairs)), rel=1e-6)


def test_a_random_delta_is_said_not_to_compress(tmp_path: Path, base: Path) -> None:
    source = lora_folder(tmp_path / "lora", pairs_of(random_pair, 24))
    report, _ = run(source, base, coefficients=100)
    assert report.verdict == "does not compress"
    assert "does not compress" in report.summary
    assert report.kept == pytest.approx(report.random_kept, abs=0.08)
    smooth, _ = run(lora_folder(tmp_path / "smooth", pairs_of(smooth_pair, 24)), base, coefficients=100)
    assert smooth.verdict == "compresses"


def test_a_result_that_is_larger_is_said_so(tmp_path: Path, base: Path) -> None:
    report, _ = run(lora_folder(tmp_path / "lora", pairs_of(random_pair, 1)), base, coefficients=3000)
    assert report.bytes_out > report.bytes_in
    assert "NOT smaller" in report.summary


def test_the_curve_agrees_with_other_runs(tmp_path: Path, base: Path) -> None:
    source = lora_folder(tmp_path / "lora", pairs_of(random_pair, 5))
    each, _ = run(source, base, coefficients=16)
    for n in (4, 64, 512):
        target = tmp_path / f"small-{n}"
        exact = compress(Config(source=source, target=target, model=str(base), coefficients=n))
        near = next(point for point in each.curve if point.coefficients == exact.coefficients)
        assert near.relative_error == pytest.approx(exact.relative_error, rel=0.01)
        assert near.bytes == pytest.approx(exact.bytes_out, abs=64)
        assert near.random_error == pytest.approx(math.sqrt(1 - exact.random_kept), rel=1e-6)
    overall, _ = run(lora_folder(tmp_path / "again", pairs_of(random_pair, 5)), base, total=300)
    for point in overall.curve:
        together = torch.cat([spectrum_of(delta).flatten() for delta in dense(pairs_of(random_pair, 5)).values()])
        left = together.abs().sort().values[: together.numel() - point.coefficients]
        assert point.relative_error == pytest.approx(float(left.norm() / together.norm()), abs=1e-6)
    assert overall.curve[-1].relative_error == 0
    assert each.curve[-1].relative_error == 0


def test_an_adapter_of_coefficients_is_thinned_out(tmp_path: Path, base: Path) -> None:
    """LoCA to less LoCA: no transform, and the same numbers."""
    first, target = run(lora_folder(tmp_path / "lora", pairs_of(random_pair, 4)), base, coefficients=80)
    again, smaller = run(target, base, coefficients=20)
    direct, other = run(lora_folder(tmp_path / "same", pairs_of(random_pair, 4)), base, coefficients=20)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (smaller, other))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    assert (again.source, first.source) == ("loca", "lora")
    assert direct.coefficients == again.coefficients


def test_a_server_answers_with_what_was_written(
    tmp_path: Path, base: Path, tiny_server: ThreadServer, tiny_reference: MergedReference
) -> None:
    pairs = {module: (b * 3, a) for module, (b, a) in pairs_of(smooth_pair, 4).items()}
    report, target = run(lora_folder(tmp_path / "lora", pairs), base, total=400, dtype="bfloat16")
    assert len({each.coefficients for each in report.modules}) > 1
    prompt = tiny_tokenizer()("the thin tone").input_ids
    with tiny_server.client() as client:
        client.adapters.load(target, id="small")
        found = client.generate("the thin tone", adapter="small", max_new_tokens=12, ignore_eos=True).token_ids
    assert list(found) == tiny_reference.greedy(target, prompt, 12)
    assert list(found) != tiny_reference.greedy(None, prompt, 12)


@pytest.mark.parametrize(
    "budget", [{"error": 0.1}, {"total": 101}, {"bytes": 1000}], ids=lambda budget: next(iter(budget))
)
def test_more_than_memory_holds_is_refused(
    tmp_path: Path, base: Path, budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overtone.tuning.compress.budget.MOST", 100)
    source = lora_folder(tmp_path / "lora", pairs_of(random_pair, 3))
    with pytest.raises(InvalidRequest, match="more than the 100") as caught:
        run(source, base, **budget)
    assert caught.value.field == next(iter(budget))
    assert run(source, base, total=100)[0].coefficients == 100


def test_require_error_writes_nothing(tmp_path: Path, base: Path) -> None:
    source = lora_folder(tmp_path / "lora", pairs_of(random_pair, 24))
    with pytest.raises(InvalidRequest, match=r"more than 0\.2: nothing is written") as caught:
        run(source, base, coefficients=10, require_error=0.2, report=tmp_path / "report.json")
    assert caught.value.field == "require_error"
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    report, _ = run(source, base, coefficients=10, require_error=0.999)
    assert report.relative_error < 0.999


def test_the_report_is_json_with_a_plot(tmp_path: Path, base: Path) -> None:
    where = tmp_path / "made" / "report.json"
    report, _ = run(lora_folder(tmp_path / "lora", pairs_of(random_pair, 4)), base, coefficients=10, report=where)
    assert json.loads(where.read_text()) == json.loads(json.dumps(report.as_dict()))
    assert where.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in where.parent.iterdir()) == ["report.json", "report.png"]


def test_origin_is_carried_over(tmp_path: Path, base: Path) -> None:
    source = lora_folder(
        tmp_path / "lora",
        {Q0: random_pair(SHAPES[Q0], 2)},
        base_model_name_or_path="example/base",
        task_type="CAUSAL_LM",
    )
    report, target = run(source, base, coefficients=10)
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("example/base", "CAUSAL_LM")
    assert len(report.warnings) == 1
    target.rename(tmp_path / "first")
    _, target = run(source, base, coefficients=10, base_name="demo")
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("the hen in the inn\n\nanother on the heath\nxx xx xx xx\n", encoding="utf-8")
    return path


def activation_error(target: Path, deltas: dict[str, torch.Tensor]) -> float:
    """On the prompts of `prompts_file`, by the plain model."""
    model, inputs = tiny_model(), dict[str, list[torch.Tensor]]()
    for module in deltas:
        layer, seen = model.get_submodule(module), inputs.setdefault(module, [])
        layer.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(args[0][0].double()))
    for line in ("the hen in the inn", "another on the heath", "xx xx xx xx"):
        model(input_ids=torch.tensor([tiny_tokenizer()(line).input_ids]))
    error = energy = 0.0
    for module, delta in deltas.items():
        x = torch.cat(inputs[module]).T
        left = delta - torch.as_tensor(dense_delta(target, module, (delta.shape[0], delta.shape[1])))
        error, energy = error + float((left @ x).square().sum()), energy + float((delta @ x).square().sum())
    return math.sqrt(error / energy)


def test_a_refit_lowers_the_error_on_what_the_layers_see(tmp_path: Path, base: Path) -> None:
    pairs = pairs_of(random_pair, 6)
    plain, first = run(lora_folder(tmp_path / "plain", pairs), base, coefficients=60)
    source, prompts = lora_folder(tmp_path / "fitted", pairs), prompts_file(tmp_path)
    fitted, target = run(source, base, coefficients=60, refit=prompts)
    deltas = dense(pairs)
    assert fitted.activation is not None
    assert plain.activation is None
    assert fitted.activation.plain == pytest.approx(activation_error(first, deltas), rel=1e-4)
    assert fitted.activation.fitted == pytest.approx(activation_error(target, deltas), rel=1e-4)
    assert fitted.activation.fitted < 0.97 * fitted.activation.plain
    assert fitted.relative_error == pytest.approx(error_of(target, deltas), rel=1e-6)
    assert fitted.relative_error >= plain.relative_error
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, target))
    assert all(torch.equal(one[name], two[name]) for name in one if name.endswith("indices"))


def test_a_refit_in_parts_is_the_same(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, prompts = pairs_of(random_pair, 6), prompts_file(tmp_path)
    whole, one = run(lora_folder(tmp_path / "whole", pairs), base, coefficients=60, refit=prompts)
    monkeypatch.setattr(calibrate, "in_parts", lambda features, limit: in_parts(features, 0))
    parts, two = run(lora_folder(tmp_path / "parts", pairs), base, coefficients=60, refit=prompts)
    assert whole.activation == parts.activation
    assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()


def test_planes_of_the_oracle_agree() -> None:
    """What these tests compare with is its own inverse."""
    delta = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(delta_of(spectrum_of(delta)), delta)
