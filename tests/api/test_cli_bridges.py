"""`overtone adapters convert` and `export`, on a tiny model in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from overtone.api.cli import main
from overtone.api.config import ServerConfig
from overtone.kernels import reference
from support.all_families import FAMILIES, make_pica_folder
from support.dense import deltas_in
from support.peft_checks import parse_folder
from support.peft_folders import peft_deltas
from support.tiny import tiny_model, tiny_tokenizer

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration file, no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for setting in (*(each.name for each in fields(ServerConfig)), "config", "rank", "to", "json"):
        monkeypatch.delenv(f"OVERTONE_{setting.upper()}", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["adapters", *map(str, arguments)], catch_exceptions=False)


def make(name: str, folder: str = "a") -> Path:
    return FAMILIES[name](Path(folder), tiny_model(), [Q, DOWN], 0.3)


def pickled(folder: Path) -> Path:
    weights = next(folder.glob("*.safetensors"))
    torch.save(load_file(weights), folder / "weights.pt")
    weights.unlink()
    return folder


def test_a_pickle_needs_no_model() -> None:
    """--model names one that does not exist in the settings, which would fail."""
    folder = pickled(make("lora"))
    Path("overtone.toml").write_text('model = "no/such/model"\n')
    result = run("convert", folder, "b", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    size = sum(path.stat().st_size for path in Path("b").iterdir())
    assert told == {
        "target": "b",
        "family": "lora",
        "changes": ["weights.pt is now adapter_model.safetensors"],
        "ignored": [],
        "warnings": [],
        "size_bytes": size,
    }
    assert peft_deltas(Path("b"), tiny_model()).keys() == {Q, DOWN}
    assert not Path(".overtone").exists()


def test_a_pickle_is_checked_against_a_model_that_is_given(model_folder: str) -> None:
    folder = pickled(make("lora"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another"}))
    result = run("convert", folder, "b", "--model", model_folder)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: made for the base model another")
    assert "weights.pt is now adapter_model.safetensors\nwrote b: lora," in result.stdout
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 99}))
    result = run("convert", folder, "c", "--model", model_folder)
    assert (result.exit_code, Path("c").exists()) == (1, False)
    assert result.stderr.startswith("error: base_model.model.")
    assert result.stderr.endswith("[ADAPTER_MALFORMED]\n")


def test_what_is_refused_leaves_nothing() -> None:
    folder = make("lora")
    (folder / "adapter_model.bin").touch()
    before = sorted(Path().rglob("*"))
    result = run("convert", folder, "b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "several files of weights" in result.stderr
    assert result.stderr.endswith("[ADAPTER_MALFORMED]\n")
    assert run("convert", "none", "b").exit_code == 1
    Path("full").mkdir()
    Path("full/mine").touch()
    assert run("convert", folder, "full").stderr.endswith("[ADAPTER_EXISTS]\n")
    assert sorted(Path().rglob("*")) == sorted([*before, Path("full"), Path("full/mine")])


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "4"],
        ["--to", "loca", "--dtype", "float16"],
        ["--to", "lora", "--truncate"],
        ["--to", "loca", "--integer-indices"],
        ["--to", "lora", "--rank", "0"],
        ["--to", "pica"],
    ],
)
def test_options_that_do_not_go_together(options: list[str]) -> None:
    result = run("convert", make("loca"), "b", *options)
    assert (result.exit_code, Path("b").exists()) == (2, False)


def test_loca_in_integers(model_folder: str) -> None:
    folder = make("loca")
    result = run("convert", folder, "b", "--integer-indices", "--model", model_folder)
    assert result.exit_code == 0
    assert "locations are integers now" in result.stdout
    tensors = load_file("b/adapter_model.safetensors")
    assert tensors[f"base_model.model.{Q}.spectrum_indices"].dtype == torch.int32
    assert_same_deltas(Path("b"), folder, 1e-6)


def test_sdctft_to_loca(model_folder: str) -> None:
    folder = make("sdctft")
    result = run("convert", folder, "b", "--to", "loca", "--model", model_folder, "--json")
    assert json.loads(result.stdout)["family"] == "loca"
    assert json.loads(Path("b/adapter_config.json").read_text())["peft_type"] == "LOCA"
    assert_same_deltas(Path("b"), folder, 1e-6)
    assert run("convert", make("shira", "s"), "c", "--to", "loca", "--model", model_folder).exit_code == 1
    assert not Path("c").exists()


def assert_same_deltas(one: Path, other: Path, bound: float) -> None:
    """By their definitions."""
    got, wanted = (deltas_in(folder, tiny_model()) for folder in (one, other))
    assert got.keys() == wanted.keys()
    for module in wanted:
        assert float((got[module] - wanted[module]).norm()) <= bound * float(wanted[module].norm())


def test_pica_with_its_basis(model_folder: str) -> None:
    folder = make_pica_folder(Path("a"), {"q_proj": 96}, rank=5, strength=0.3)
    result = run("convert", folder, "b", "--with-basis", "--pin-basis", "--model", model_folder)
    assert result.exit_code == 0
    assert "the singular vectors of 2 layers are inside" in result.stdout
    tensors = load_file("b/pica_adapter.safetensors")
    assert tensors[f"basis.{Q}"].shape == (5, 64)
    digest = json.loads(Path("b/pica_config.json").read_text())["basis_sha256"]
    assert digest[:12] in result.stdout
    # What the server of this store has, or will have.
    kept = list(Path(".overtone/bases").rglob("*"))
    assert kept
    assert_same_deltas(Path("b"), folder, 1e-6)


@pytest.mark.parametrize("command", [["export"], ["convert"]])
def test_an_exact_export(model_folder: str, command: list[str]) -> None:
    folder = make("dcft")
    result = run(*command, folder, "b", "--to", "lora", "--model", model_folder, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["family"], told["source_family"], told["target"]) == ("lora", "dcft", "b")
    by_name = {each["name"]: each for each in told["modules"]}
    assert by_name.keys() == {Q, DOWN}
    assert (by_name[Q]["out_features"], by_name[Q]["in_features"]) == (96, 64)
    assert all(each["exact"] and each["rank"] == 8 for each in told["modules"])
    assert 0 < told["relative_error"] < 1e-6
    assert told["parameter_count"] == 2 * 8 * (96 + 64)
    assert told["size_bytes"] == sum(path.stat().st_size for path in Path("b").iterdir())
    assert_same_deltas(Path("b"), folder, 1e-6)


def test_an_approximation_needs_a_rank_and_says_what_it_loses(model_folder: str) -> None:
    folder = make("c3a")
    result = run("export", folder, "b", "--to", "lora", "--model", model_folder)
    assert (result.exit_code, Path("b").exists()) == (1, False)
    assert "--rank" in result.stderr
    assert result.stderr.count("\n") == 1
    result = run("export", folder, "b", "--to", "lora", "--model", model_folder, "--rank", "8")
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert rows[Q][1:6] == ["96", "x", "64", "8", "truncated"]
    wanted, got = deltas_in(folder, tiny_model()), peft_deltas(Path("b"), tiny_model())
    for module in (Q, DOWN):
        error = float((got[module] - wanted[module]).norm() / wanted[module].norm())
        assert float(rows[module][-1]) == pytest.approx(error, rel=0.01)
    squares = sum(float((got[m] - wanted[m]).square().sum()) for m in wanted)
    total = (squares / sum(float(delta.square().sum()) for delta in wanted.values())) ** 0.5
    assert float(rows["all"][-1]) == pytest.approx(total, rel=0.01)


def test_dora_and_half_precision(model_folder: str) -> None:
    """The diagonal part of DoRA needs the base model's own weights."""
    folder = make("dora")
    options = ["--to", "lora", "--model", model_folder, "--rank", "64", "--dtype", "bfloat16"]
    told = json.loads(run("export", folder, "b", *options, "--json").stdout)
    assert 1e-4 < told["relative_error"] < 1e-2
    assert {t.dtype for t in load_file("b/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert_same_deltas(Path("b"), folder, 1e-2)


def test_cutting_what_is_exact(model_folder: str) -> None:
    folder = make("dcft")
    common = ["--to", "lora", "--model", model_folder, "--rank", "3", "--json"]
    kept, cut = (json.loads(run("export", folder, name, *common, *more).stdout) for name, more in CUTS.items())
    assert {each["rank"] for each in kept["modules"]} == {8}
    assert {each["rank"] for each in cut["modules"]} == {3}
    parsed = parse_folder(Path("cut"), tiny_model())
    wanted = deltas_in(folder, tiny_model())[Q]
    error = float((reference.dense_delta(parsed.deltas[Q]) - wanted).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(wanted)[3:].norm()), rel=1e-4)


CUTS: dict[str, list[str]] = {"kept": [], "cut": ["--truncate"]}


def test_settings_are_the_servers(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model from the environment; its projectors in the store of the file."""
    monkeypatch.setenv("OVERTONE_MODEL", model_folder)
    monkeypatch.setenv("OVERTONE_RANK", "nonsense")
    Path("overtone.toml").write_text('store = "elsewhere"\ndtype = "float16"\n')
    folder = make_pica_folder(Path("a"), {"q_proj": 96}, rank=5, strength=0.3)
    result = run("export", folder, "b", "--to", "lora", "--json")
    assert result.exit_code == 0
    assert {each["rank"] for each in json.loads(result.stdout)["modules"]} == {5}
    assert list(Path("elsewhere/bases").rglob("*"))
    assert not Path(".overtone").exists()
    assert_same_deltas(Path("b"), folder, 1e-6)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from overtone.api.cli import main\n"
        "main(['adapters', 'convert', '--help'], standalone_mode=False)\n"
        "main(['adapters', 'export', '--help'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "--with-basis" in done.stdout
