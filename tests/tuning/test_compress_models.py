"""Fine-tuned models against their base, and whatever a compression refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from overtone.errors import (
    AdapterExists,
    BaseModelMismatch,
    InvalidAdapter,
    InvalidRequest,
    NonFiniteAdapter,
    OvertoneError,
    UnsupportedAdapter,
)
from overtone.tuning.compress import Config, Report, compress
from overtone.tuning.compress.cli import compress as command
from support.compressing import (
    DOWN1,
    Q0,
    SHAPES,
    V0,
    coarse_model,
    lora_folder,
    model_folder,
    random_pair,
    write_adapter,
)
from support.tiny import tiny_model

NORM, EMBED = "model.norm.weight", "model.embed_tokens"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights to which small ones can be added exactly."""
    return model_folder(tmp_path_factory.mktemp("base") / "model", coarse_model())


def coarse_pairs(rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Their products are multiples of 2^-10 and small: exact in float32, and so are sums with `coarse_model`."""
    pairs = {
        module: random_pair(shape, rank, seed, strength=1.0) for seed, (module, shape) in enumerate(SHAPES.items())
    }
    return {module: ((b * 8).round() / 32, (a * 8).round() / 32) for module, (b, a) in pairs.items()}


def tuned_folder(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The base with other parameters."""
    model_folder(folder, coarse_model())
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def add_pairs(tensors: dict[str, torch.Tensor]) -> None:
    for module, (b, a) in coarse_pairs().items():
        tensors[f"{module}.weight"] += b @ a


def run(source: Path, base: Path, **options: Any) -> tuple[Report, dict[str, torch.Tensor]]:
    target = source.with_name(f"{source.name}-small")
    report = compress(Config(source=source, target=target, model=str(base), **{"total": 200, **options}))
    return report, load_file(target / "adapter_model.safetensors")


def refused(expected: type[OvertoneError], source: Path, base: Path, **options: Any) -> OvertoneError:
    with pytest.raises(expected) as caught:
        run(source, base, **options)
    assert not source.with_name(f"{source.name}-small").exists()
    return caught.value


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_fine_tuned_model_is_its_difference(tmp_path: Path, base: Path) -> None:
    low, of_lora = run(lora_folder(tmp_path / "lora", coarse_pairs()), base)
    whole, of_model = run(tuned_folder(tmp_path / "tuned", add_pairs), base)
    assert_same(of_model, of_lora)
    assert whole.relative_error == pytest.approx(low.relative_error, rel=1e-5)
    assert (whole.source, low.source) == ("model", "lora")
    assert {each.name for each in whole.modules} == set(SHAPES)
    assert whole.bytes_in == (tmp_path / "tuned" / "model.safetensors").stat().st_size


def sharded(folder: Path) -> dict[str, Any]:
    """A folder with one file becomes one with two; returns its index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    weight_map = {name: file for file, mine in shards.items() for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_one_model(tmp_path: Path, base: Path) -> None:
    _, expected = run(tuned_folder(tmp_path / "tuned", add_pairs), base)
    folder = tuned_folder(tmp_path / "shards", add_pairs)
    sharded(folder)
    assert_same(run(folder, base)[1], expected)


@pytest.mark.parametrize("bad", ["../b.safetensors", 7, "c.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, base: Path, bad: object) -> None:
    folder = tuned_folder(tmp_path / "shards", add_pairs)
    weight_map = sharded(folder)
    weight_map[NORM] = bad
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert refused(InvalidRequest, folder, base).field == "source"


@pytest.mark.parametrize("kind", ["gpt2", "tied", "gpt_neox"])
def test_other_layouts(tmp_path: Path, kind: str) -> None:
    """Conv1D is turned round; a head that is tied to the embedding is no layer of its own."""
    changes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
        "tied": {"tie_word_embeddings": True},
        "gpt_neox": {},
    }[kind]
    name = "llama" if kind == "tied" else kind
    module = {"gpt2": "transformer.h.1.mlp.c_fc", "tied": Q0, "gpt_neox": "gpt_neox.layers.0.mlp.dense_h_to_4h"}[kind]
    plain = model_folder(tmp_path / "plain", tiny_model(name, **changes))
    model = tiny_model(name, **changes)
    weight = model.get_submodule(module).weight
    shape = tuple(weight.T.shape if kind == "gpt2" else weight.shape)
    b, a = random_pair((shape[0], shape[1]), 2)
    weight += (b @ a).T if kind == "gpt2" else b @ a
    _, found = run(model_folder(tmp_path / "tuned", model), plain)
    _, expected = run(lora_folder(tmp_path / "lora", {module: (b, a)}), plain)
    assert_same(
        {k: v for k, v in found.items() if k.endswith("spectrum")},
        {k: v for k, v in expected.items() if k.endswith("spectrum")},
    )


def test_a_checkpoint_without_the_prefix_is_understood(tmp_path: Path) -> None:
    """As GPT-2 itself is published."""
    changes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    plain, model = model_folder(tmp_path / "plain", tiny_model("gpt2", **changes)), tiny_model("gpt2", **changes)
    model.transformer.h[0].attn.c_proj.weight += 0.125
    folder = model_folder(tmp_path / "tuned", model)
    _, expected = run(folder, plain)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tuned-small").rename(tmp_path / "first")
    _, found = run(folder, plain)
    assert_same(found, expected)


def test_a_layer_that_the_files_call_otherwise_is_not_lost(tmp_path: Path) -> None:
    """transformers calls GPT-NeoX's embed_out lm_head."""
    plain, model = model_folder(tmp_path / "plain", tiny_model("gpt_neox")), tiny_model("gpt_neox")
    model.lm_head.weight += 0.125
    error = refused(InvalidRequest, model_folder(tmp_path / "tuned", model), plain)
    assert (error.field, error.metadata["first"]) == ("rest", "embed_out.weight")


def test_what_no_layer_holds_is_refused_or_left_out(tmp_path: Path, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        add_pairs(tensors)
        tensors[NORM] += 1
        tensors["model.embed_tokens.weight"][3] += 1
        tensors["score.weight"] = torch.ones(2, 64)

    folder = tuned_folder(tmp_path / "tuned", change)
    error = refused(InvalidRequest, folder, base)
    assert error.field == "rest"
    assert "model.embed_tokens.weight and 2 more" in error.message
    report, _ = run(folder, base, rest="drop")
    assert set(report.left_out) == {NORM, "model.embed_tokens.weight", "score.weight"}


def test_targets_keep_some_layers(tmp_path: Path, base: Path) -> None:
    folder = tuned_folder(tmp_path / "tuned", add_pairs)
    error = refused(InvalidRequest, folder, base, targets=("q_proj",))
    assert (error.field, error.metadata["first"]) == ("rest", f"{V0}.weight")
    report, tensors = run(folder, base, targets=("q_proj", DOWN1), rest="drop")
    assert set(report.left_out) == {f"{V0}.weight"}
    source = lora_folder(tmp_path / "lora", coarse_pairs())
    assert refused(InvalidRequest, source, base, targets=("q_proj",)).metadata["first"] == V0
    low, same = run(source, base, targets=("q_proj", "layers.1.mlp.down_proj"), rest="drop")
    assert low.left_out == (V0,)
    assert_same(tensors, same)
    for each in (source, folder):
        (each.with_name(f"{each.name}-small")).rename(tmp_path / f"old-{each.name}")
        assert refused(InvalidRequest, each, base, targets=("proj",), rest="drop").field == "targets"


def set_to(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (None, BaseModelMismatch, "the fine-tuned model has no tensor"),
        (torch.zeros(96, 32), BaseModelMismatch, r"\(96, 32\)"),
        (torch.full((96, 64), torch.nan), NonFiniteAdapter, r"\[0, 0\] is nan"),
        (torch.zeros(96, 64, dtype=torch.int8), BaseModelMismatch, "int8"),
    ],
    ids=["missing", "shape", "nan", "packed"],
)
def test_a_model_that_is_no_fine_tune_is_refused_by_its_tensor(
    tmp_path: Path, base: Path, tensor: torch.Tensor | None, error: type[OvertoneError], message: str
) -> None:
    folder = tuned_folder(tmp_path / "tuned", set_to(f"{Q0}.weight", tensor))
    with pytest.raises(error, match=message) as caught:
        run(folder, base)
    assert Q0 in str(caught.value.field)


def lora_tensors(module: str, p: int, q: int) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": torch.ones(2, q), f"{prefix}.lora_B.weight": torch.ones(p, 2)}


def test_adapters_that_are_refused_name_the_module(tmp_path: Path, base: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    dora = lora_tensors(Q0, 96, 64) | {f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(96)}
    error = refused(UnsupportedAdapter, write_adapter(tmp_path / "dora", dora, {**config, "use_dora": True}), base)
    assert error.field == Q0
    assert "DoRA" in error.message
    embedding = {
        f"base_model.model.{EMBED}.lora_embedding_A": torch.ones(2, 266),
        f"base_model.model.{EMBED}.lora_embedding_B": torch.ones(64, 2),
    }
    error = refused(UnsupportedAdapter, write_adapter(tmp_path / "embedding", embedding, config), base)
    assert error.field == EMBED
    assert "embedding" in error.message
    missing = lora_tensors("model.layers.7.self_attn.q_proj", 96, 64)
    error = refused(BaseModelMismatch, write_adapter(tmp_path / "missing", missing, config), base)
    assert "model.layers.7" in str(error.field)
    shape = lora_tensors(Q0, 96, 32)
    error = refused(InvalidAdapter, write_adapter(tmp_path / "shape", shape, config), base)
    assert Q0 in str(error.field)
    nan = lora_tensors(Q0, 96, 64)
    nan[f"base_model.model.{Q0}.lora_B.weight"][4, 1] = torch.nan
    error = refused(NonFiniteAdapter, write_adapter(tmp_path / "nan", nan, config), base)
    assert Q0 in str(error.field)


def test_sources_and_targets_that_are_none(tmp_path: Path, base: Path) -> None:
    assert refused(InvalidRequest, tmp_path / "nowhere", base).field == "source"
    (tmp_path / "empty").mkdir()
    assert refused(InvalidRequest, tmp_path / "empty", base).field == "source"
    zero = {Q0: (torch.zeros(96, 2), torch.ones(2, 64))}
    for budget in ({"coefficients": 3, "total": None}, {"total": 3}, {"error": 0.5, "total": None}):
        source = lora_folder(tmp_path / f"zero-{next(iter(budget))}", zero)
        assert "changes nothing" in refused(InvalidRequest, source, base, **budget).message
    huge = lora_folder(tmp_path / "huge", {Q0: random_pair(SHAPES[Q0], 2, strength=1e4)})
    error = refused(NonFiniteAdapter, huge, base, dtype="float16")
    assert (error.field, "float16" in error.message) == (Q0, True)
    assert refused(InvalidRequest, huge, base, total=None, bytes=100).field == "bytes"
    source = lora_folder(tmp_path / "lora", coarse_pairs())
    (tmp_path / "lora-small").mkdir()
    (tmp_path / "lora-small" / "mine").touch()
    with pytest.raises(AdapterExists):
        run(source, base)
    assert [path.name for path in (tmp_path / "lora-small").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (b"\n  \n", "p.txt", "has no prompts"),
        (b"fine\n\xff\n", "p.txt", "line 2: not UTF-8"),
        (b'{"prompt": "a"}\n{', "p.jsonl", "line 2: not JSON"),
        (b'{"text": "a"}\n', "p.jsonl", "line 1: an object"),
        (b'{"prompt": "a", "completion": 3}\n', "p.jsonl", "completion must be text"),
        (None, "p.txt", "cannot be read"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, base: Path, text: bytes | None, name: str, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    error = refused(InvalidRequest, lora_folder(tmp_path / "lora", coarse_pairs()), base, refit=path)
    assert error.field == "refit"
    assert message in error.message


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "coefficients"),
        ({"coefficients": 3, "total": 4}, "total"),
        ({"coefficients": 0}, "coefficients"),
        ({"total": -1}, "total"),
        ({"bytes": 1.5}, "bytes"),
        ({"error": 0.0}, "error"),
        ({"error": 1.0}, "error"),
        ({"error": float("nan")}, "error"),
        ({"total": 3, "bands": True}, "bands"),
        ({"error": 0.1, "refit": Path("prompts.txt")}, "refit"),
        ({"total": 3, "family": "lora"}, "family"),
        ({"total": 3, "dtype": "int8"}, "dtype"),
        ({"total": 3, "rest": "keep"}, "rest"),
        ({"total": 3, "ridge": 0.0}, "ridge"),
        ({"total": 3, "max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({"total": 3, "refit_memory_mib": 0}, "refit_memory_mib"),
        ({"total": 3, "require_error": 2}, "require_error"),
        ({"total": 3, "targets": ()}, "targets"),
    ],
    ids=str,
)
def test_settings_are_checked_by_their_names(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Config(source=Path("a"), target=Path("b"), **options)
    assert caught.value.field == field


def test_the_command_tells_what_was_lost(tmp_path: Path, base: Path) -> None:
    source, target = lora_folder(tmp_path / "lora", coarse_pairs()), tmp_path / "small"
    arguments = [str(source), str(target), "--model", str(base), "-n", "50"]
    told = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert told.exit_code == 0
    assert "does not compress" in told.output
    assert all(module in told.output for module in SHAPES)
    assert f"wrote {target}: loca, float32" in told.output.replace("\n", "")
    arguments = [
        str(source),
        str(tmp_path / "other"),
        "--model",
        str(base),
        "--error",
        "0.3",
        "--json",
        "--only",
        "q_proj",
    ]
    told = CliRunner().invoke(command, [*arguments, "--drop-rest"], catch_exceptions=False)
    facts = json.loads(told.output)
    assert facts["relative_error"] <= 0.3
    assert [each["name"] for each in facts["modules"]] == [Q0]
