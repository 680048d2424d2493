"""Folders in the layouts of authors and forks, conversions within our own families, and the folder that comes out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from overtone.adapters import AdapterFiles, BaseDescription, ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.bridges import (
    Draft,
    check_target,
    normalised,
    read_source,
    to_loca,
    with_basis,
    with_integer_indices,
    write_folder,
)
from overtone.adapters.projectors import Projectors
from overtone.errors import (
    AdapterExists,
    AdapterIndexOutOfRange,
    BaseModelMismatch,
    InvalidAdapter,
    OvertoneError,
    StoreFailed,
    UnsupportedAdapter,
)
from overtone.kernels import Delta, SparseCore, reference
from support.adapters import BASE, SHAPES, make_loca_folder, make_sdctft_folder
from support.all_families import FAMILIES, make_dcft_folder, make_pica_folder, projections
from support.dense import deltas_in
from support.peft_base import base_of
from support.tiny import tiny_model

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def drafted(folder: Path) -> Draft:
    return normalised(Draft.of(read_source(folder)))


def parsed(draft: Draft, base: BaseDescription = BASE) -> ParsedAdapter:
    return parse_adapter(draft.files(), ParserContext(base, projectors=Projectors(None, base)))


def pickled(folder: Path, name: str = "adapter_model.bin", **changes: torch.Tensor) -> Path:
    """The folder with its weights, and `changes` of them, in a file of torch.save."""
    weights = next(folder.glob("*.safetensors"))
    torch.save({**load_file(weights), **changes}, folder / name)
    weights.unlink()
    return folder


def renamed(folder: Path, rename: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Path:
    weights = next(folder.glob("*.safetensors"))
    pairs = [rename(name, tensor) for name, tensor in load_file(weights).items()]
    save_file({pair[0]: pair[1].clone().contiguous() for pair in pairs if pair}, weights)
    return folder


def equal_deltas(one: Mapping[str, Delta], other: Mapping[str, Delta]) -> bool:
    """To the last bit, of sparse cores."""
    cores = [(one[m].terms[0].core, other[m].terms[0].core) for m in one]
    return one.keys() == other.keys() and all(
        isinstance(a, SparseCore)
        and isinstance(b, SparseCore)
        and torch.equal(a.values, b.values)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.cols, b.cols)
        for a, b in cores
    )


@pytest.mark.parametrize("name", ["loca", "dcft", "pica", "lora", "vera", "c3a", "vblora"])
def test_a_pickle_becomes_what_it_was_made_of(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    folder = FAMILIES[name](tmp_path / "a", model, projections(model, [0]), 0.3)
    wanted, stored = deltas_in(folder, model), load_file(next(folder.glob("*.safetensors")))
    pickled(folder, "pica_adapter.bin" if name == "pica" else "adapter_model.bin")
    draft = drafted(folder)
    write_folder(tmp_path / "b", draft.files())
    layout = ("pica_config.json", "pica_adapter.safetensors") if name == "pica" else (CONFIG, WEIGHTS)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(layout)
    assert len(draft.changes) == 1
    written = load_file(tmp_path / "b" / layout[1])
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in stored.items())
    assert json.loads((tmp_path / "b" / layout[0]).read_text()) == json.loads((folder / layout[0]).read_text())
    deltas = parsed(draft, base_of(model)).deltas
    assert deltas.keys() == wanted.keys()
    for module, delta in deltas.items():
        error = float((reference.dense_delta(delta) - wanted[module]).norm())
        assert error <= 1e-6 * float(wanted[module].norm())


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pth", "pytorch_model.bin"])
def test_a_bare_file_beside_a_configuration(tmp_path: Path, name: str) -> None:
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=5, seed=0)
    wide = {f"{PREFIX}{Q}.spectrum": torch.linspace(0, 1, 5, dtype=torch.float64)}
    pickled(folder, name, **wide)
    (folder / "README.md").write_text("")
    (folder / "trainer_state.json").write_text("")
    source = read_source(folder)
    assert (source.weights, source.ignored) == (name, ("trainer_state.json",))
    draft = normalised(Draft.of(source))
    assert draft.tensors[f"{PREFIX}{Q}.spectrum"].dtype == torch.float64
    assert len(parsed(draft).deltas) == len(SHAPES)


def test_of_a_training_run_only_the_adapter_is_read(tmp_path: Path) -> None:
    """optimizer.pt and the like do not make it unclear which file is meant."""
    folder = pickled(make_loca_folder(tmp_path / "a", SHAPES, n=5, seed=0))
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        (folder / name).write_bytes(b"not to be read")
    assert read_source(folder).ignored == ("optimizer.pt", "scheduler.pt", "training_args.bin")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: (f / CONFIG).unlink(), CONFIG),
        (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
        (lambda f: (f / "adapter_model.bin").write_bytes(b""), "adapter_model.bin"),
        (lambda f: (f / "pica_config.json").write_text("{}"), "pica_config.json"),
        (lambda f: (f / CONFIG).write_bytes(b" " * 70_000), CONFIG),
        (lambda f: (f / CONFIG).write_bytes(b"\x80\x04N."), CONFIG),
        (lambda f: (f / CONFIG).write_text("[]"), CONFIG),
        (lambda f: (f / WEIGHTS).write_bytes(b"nothing"), WEIGHTS),
        (lambda f: [(f / WEIGHTS).rename(f / "a.pt"), (f / "b.pt").touch()], "b.pt"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": "ROAD"}'), "peft_type"),
        (lambda f: (f / CONFIG).write_text("{}"), "peft_type"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": "LOCA", "novel": 1}'), "novel"),
    ],
)
def test_broken_folders(tmp_path: Path, change: Callable[[Path], Any], field: str) -> None:
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=5, seed=0)
    change(folder)
    with pytest.raises(InvalidAdapter) as caught:
        drafted(folder).files()
    assert caught.value.field == field


def test_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(InvalidAdapter) as caught:
            read_source(path)
        assert caught.value.field == "source"


@pytest.mark.parametrize("make", [make_loca_folder, make_sdctft_folder, None])
def test_an_adapters_name_is_taken_out(tmp_path: Path, make: Any) -> None:
    if make is None:
        folder = make_dcft_folder(tmp_path / "a", SHAPES, d=2, rank=1, strength=0.1)
    else:
        folder = make(tmp_path / "a", SHAPES, n=7, seed=1)
    plain = drafted(folder)
    assert plain.changes == ()
    named = drafted(renamed(folder, lambda name, tensor: (f"{name}.my_task", tensor)))
    assert named.tensors.keys() == plain.tensors.keys()
    assert named.changes == ("the adapter's name my_task is taken out of the tensors' names",)
    some = drafted(renamed(folder, lambda n, t: (n.removesuffix(".my_task") if "A" in n or "ind" in n else n, t)))
    assert some.tensors.keys() == plain.tensors.keys()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (f"{PREFIX}{Q}.spectrum.other", f"{PREFIX}{Q}.spectrum.other"),
        (f"{PREFIX}{Q}.spectrum", f"{PREFIX}{Q}.spectrum.default"),
        (f"{PREFIX}{Q}.novel", f"{PREFIX}{Q}.novel"),
        (f"{PREFIX}{Q}.spectrum.default.more", f"{PREFIX}{Q}.spectrum.default.more"),
        (f"{Q}.spectrum", f"{Q}.spectrum"),
    ],
)
def test_names_that_are_not_clear(tmp_path: Path, name: str, field: str) -> None:
    folder = renamed(
        make_loca_folder(tmp_path / "a", SHAPES, n=5, seed=0), lambda name, tensor: (name + ".default", tensor)
    )
    stored = load_file(folder / WEIGHTS)
    save_file({**stored, name: torch.ones(5)}, folder / WEIGHTS)
    with pytest.raises(InvalidAdapter) as caught:
        drafted(folder)
    assert caught.value.field == field


def test_dcft_of_its_authors(tmp_path: Path) -> None:
    """No prefix, and kernels as conv_transpose2d takes them."""
    folder = make_dcft_folder(tmp_path / "a", SHAPES, d=2, rank=1, strength=0.1)
    wanted = parsed(drafted(folder)).deltas

    def as_authors(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.removeprefix(PREFIX), tensor[None, None] if name.endswith("lora_C") else tensor

    draft = drafted(renamed(folder, as_authors))
    assert draft.changes == (f"names begin with {PREFIX} now",)
    found = parsed(draft).deltas
    assert found.keys() == wanted.keys()
    assert all(torch.equal(reference.dense_delta(found[m]), reference.dense_delta(wanted[m])) for m in wanted)


def test_lying_indices_are_put_upright(tmp_path: Path) -> None:
    folder = make_sdctft_folder(tmp_path / "a", SHAPES, n=5, seed=0)
    wanted = parsed(drafted(folder)).deltas
    draft = drafted(renamed(folder, lambda n, t: (n, t.T if n.endswith("indices") else t)))
    assert draft.changes == ("indices are (2, n) now, not (n, 2)",)
    assert equal_deltas(parsed(draft).deltas, wanted)


def test_a_square_of_indices_follows_the_others(tmp_path: Path) -> None:
    """(2, 2) by itself may be either."""
    folder = make_sdctft_folder(tmp_path / "a", SHAPES, n=5, seed=0)
    square = {f"{PREFIX}{Q}.spectrum": torch.ones(2), f"{PREFIX}{Q}.indices": torch.tensor([[1, 2], [3, 4]])}
    lying = renamed(folder, lambda n, t: (n, t.T if n.endswith("indices") else t))
    save_file({**load_file(lying / WEIGHTS), **square}, lying / WEIGHTS)
    config = json.loads((lying / CONFIG).read_text())
    (lying / CONFIG).write_text(json.dumps({**config, "n_frequency": None}))
    assert drafted(lying).tensors[f"{PREFIX}{Q}.indices"].tolist() == [[1, 3], [2, 4]]
    save_file({**load_file(lying / WEIGHTS), f"{PREFIX}{Q}.indices": torch.zeros(2, 3).int()}, lying / WEIGHTS)
    with pytest.raises(UnsupportedAdapter) as caught:
        drafted(lying)
    assert caught.value.field == f"{PREFIX}{Q}.indices"
    save_file(square, lying / WEIGHTS)
    with pytest.raises(UnsupportedAdapter) as caught:
        drafted(lying)
    assert caught.value.field == f"{PREFIX}{Q}.indices"


PICA_KEYS = {"q_proj": 24, "up_proj": 40}


def pica_folder(folder: Path) -> Path:
    return make_pica_folder(folder, PICA_KEYS, rank=3, strength=0.1)


def pica_base(seed: int = 0) -> BaseDescription:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return replace(BASE, weight=weights.__getitem__)


@pytest.mark.parametrize(
    "name",
    [
        lambda kind: f"shared_m.{kind}",
        lambda kind: f"base_model.model.shared_m.{kind}",
        lambda kind: f"{kind}.shared_m",
        lambda kind: f"{kind}.shared_m.default",
        lambda kind: f"base_model.shared_m.{kind}.default",
        lambda kind: f"{kind}.default",
    ],
)
def test_pica_under_other_names(tmp_path: Path, name: Callable[[str], str]) -> None:
    folder = pica_folder(tmp_path / "a")
    plain = drafted(folder)
    draft = drafted(renamed(folder, lambda kind, tensor: (name(kind), tensor)))
    assert draft.tensors.keys() == plain.tensors.keys() == PICA_KEYS.keys()
    assert all(torch.equal(draft.tensors[kind], plain.tensors[kind]) for kind in PICA_KEYS)
    assert draft.changes == ("tensors have the names of target_modules now",)


def test_pica_saved_once_a_layer(tmp_path: Path) -> None:
    """A shared parameter that a fork of PEFT saves under every layer's name; copies must be copies."""
    folder = pica_folder(tmp_path / "a")
    plain = drafted(folder)
    layers = {
        f"{PREFIX}{module}.shared_m.default": plain.tensors[kind]
        for module in SHAPES
        for kind in PICA_KEYS
        if kind in module
    }
    torch.save(layers, folder / "pica_adapter.bin")
    (folder / "pica_adapter.safetensors").unlink()
    draft = drafted(folder)
    assert draft.tensors.keys() == PICA_KEYS.keys()
    name = f"{PREFIX}model.layers.1.mlp.up_proj.shared_m.default"
    torch.save({**layers, name: layers[name] + 1}, folder / "pica_adapter.bin")
    with pytest.raises(UnsupportedAdapter) as caught:
        drafted(folder)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("rename", "field"),
    [
        (lambda n, t: (n + "_default", t), "q_proj_default"),
        (lambda n, t: ("k_proj.shared_m" if n == "q_proj" else n, t), "k_proj.shared_m"),
        (lambda n, t: ("up_proj.shared_m.q_proj" if n == "q_proj" else n, t), "up_proj.shared_m.q_proj"),
        (lambda n, t: None if n == "q_proj" else (n, t), "target_modules"),
    ],
)
def test_pica_under_names_that_are_not_clear(tmp_path: Path, rename: Any, field: str) -> None:
    folder = renamed(pica_folder(tmp_path / "a"), rename)
    with pytest.raises(InvalidAdapter) as caught:
        drafted(folder)
    assert caught.value.field == field


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_integer_locations_are_those_of_the_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=200, seed=3, scale=2.5)
    draft = drafted(renamed(folder, lambda n, t: (n, t.to(dtype) if n.endswith("indices") else t)))
    whole = with_integer_indices(draft, BASE)
    assert {t.dtype for n, t in whole.tensors.items() if n.endswith("indices")} == {torch.int32}
    assert whole.config == draft.config
    assert equal_deltas(parsed(whole).deltas, parsed(draft).deltas)
    assert with_integer_indices(whole, BASE) == whole


def test_integer_locations_of_what_has_none(tmp_path: Path) -> None:
    sdctft = drafted(make_sdctft_folder(tmp_path / "a", SHAPES, n=5, seed=0))
    with pytest.raises(UnsupportedAdapter) as caught:
        with_integer_indices(sdctft, BASE)
    assert caught.value.field == "peft_type"
    draft = drafted(make_loca_folder(tmp_path / "b", SHAPES, n=5, seed=0))
    name = f"{PREFIX}{Q}.spectrum_indices"
    for bad, error in (
        (draft.tensors[name] + 1, AdapterIndexOutOfRange),
        (draft.tensors[name] * torch.nan, InvalidAdapter),
        (draft.tensors[name][:1], InvalidAdapter),
        (draft.tensors[name][:, :3], InvalidAdapter),
    ):
        with pytest.raises(error) as caught:
            with_integer_indices(draft.with_tensors({**draft.tensors, name: bad}, ""), BASE)
        assert caught.value.field == name
    elsewhere = replace(BASE, modules={"model.other": (4, 4)})
    with pytest.raises(BaseModelMismatch):
        with_integer_indices(draft, elsewhere)


@pytest.mark.parametrize("transform", [None, "dct_unnormalized", "dct_orthonormal", "loca"])
def test_to_loca(tmp_path: Path, transform: str | None) -> None:
    """Also duplicates, and modules with different numbers of coefficients: the same cores, bit for bit."""
    if transform == "loca":
        folder = make_loca_folder(tmp_path / "a", SHAPES, n=60, seed=1, scale=-3.7)
    else:
        folder = make_sdctft_folder(tmp_path / "a", SHAPES, n=60, seed=1, scale=0.1, transform=transform)
        (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("SDCTFT", "MACP"))
    draft = drafted(folder)
    before = parsed(draft)
    loca = to_loca(draft, before)
    assert (loca.config["peft_type"], loca.config["scale"]) == ("LOCA", 1.0)
    assert loca.config["target_modules"] == draft.config["target_modules"]
    after = parsed(loca)
    assert after.family == "loca"
    assert equal_deltas(after.deltas, before.deltas)
    again = to_loca(loca, after)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in loca.tensors.items())


@pytest.mark.parametrize("name", ["lora", "fourierft", "shira"])
def test_what_is_no_loca(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    draft = drafted(FAMILIES[name](tmp_path / "a", model, [Q], 0.3))
    with pytest.raises(UnsupportedAdapter, match="DCT") as caught:
        to_loca(draft, parsed(draft, base_of(model)))
    assert caught.value.field == Q


def test_a_basis_of_its_own_makes_pica_independent_of_the_base(tmp_path: Path) -> None:
    base, other = pica_base(), pica_base(1)
    draft = drafted(pica_folder(tmp_path / "a"))
    before = parsed(draft, base)
    own = with_basis(draft, before, write=True, pin=True)
    assert sum(name.startswith("basis.") for name in own.tensors) == 4
    assert all(t.shape == (3, 24) for n, t in own.tensors.items() if n.startswith("basis."))
    after, elsewhere = parsed(own, base), parsed(own, other)
    assert (before.basis, after.basis, elsewhere.basis) == ("assumed", "own", "own")
    for module, delta in before.deltas.items():
        assert torch.equal(reference.dense_delta(after.deltas[module]), reference.dense_delta(delta))
        assert torch.equal(reference.dense_delta(elsewhere.deltas[module]), reference.dense_delta(delta))


def test_a_pinned_basis_is_checked(tmp_path: Path) -> None:
    base, other = pica_base(), pica_base(1)
    draft = drafted(pica_folder(tmp_path / "a"))
    pinned = with_basis(draft, parsed(draft, base), write=False, pin=True)
    assert pinned.tensors.keys() == draft.tensors.keys()
    assert parsed(pinned, base).basis == "pinned"
    with pytest.raises(BaseModelMismatch) as caught:
        parsed(pinned, other)
    assert caught.value.field == "basis_sha256"


def test_only_pica_has_a_basis(tmp_path: Path) -> None:
    draft = drafted(make_loca_folder(tmp_path / "a", SHAPES, n=5, seed=0))
    with pytest.raises(UnsupportedAdapter) as caught:
        with_basis(draft, parsed(draft), write=True, pin=False)
    assert caught.value.field == "peft_type"


FILES = AdapterFiles(b"{}", b"weights")


def test_the_target_appears_whole(tmp_path: Path) -> None:
    for target in (tmp_path / "new", tmp_path / "deep" / "er", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        write_folder(target, FILES)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == {CONFIG: b"{}", WEIGHTS: b"weights"}
        assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["file", "full", "link", "dead link"])
def test_the_target_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target, inside = tmp_path / "target", tmp_path / "elsewhere"
    inside.mkdir()
    if kind == "file":
        target.write_text("mine")
    elif kind == "full":
        target.mkdir()
        (target / "mine").touch()
    else:
        target.symlink_to(inside if kind == "link" else tmp_path / "none")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (lambda: check_target(target), lambda: write_folder(target, FILES)):
        with pytest.raises(AdapterExists) as caught:
            attempt()
        assert caught.value.field == "target"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("write_bytes", "rename"):

        def fail(self: Path, *arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, fail)
            with pytest.raises(StoreFailed, match="No space left"):
                write_folder(tmp_path / "target", FILES)
        assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_puts_there_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, write = tmp_path / "target", Path.write_bytes

    def race(self: Path, data: bytes) -> int:
        target.mkdir(exist_ok=True)
        (target / "mine").touch()
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", race)
    with pytest.raises(OvertoneError):
        write_folder(target, FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["mine"]
