"""Recipes: the fast way admits what the slow one admits, as the same bytes, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from overtone.adapters import AdapterFiles, ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.canonical import Encoded, Known, Sparse, decode, encode
from overtone.adapters.recipes import Admitted, Recipes
from overtone.errors import BaseModelMismatch, InvalidAdapter
from support.adapters import BASE, SHAPES, adapter_files, make_loca_folder, make_sdctft_folder
from support.canonical import InMemory, assert_same
from support.folders import Folder
from support.folders_of_coefficients import fourierft, loca, sdctft, shira, waveft
from support.kin import Kin, kin, safetensors_file

FAMILIES: Mapping[str, Callable[[], st.SearchStrategy[Folder]]] = {
    f.__name__: f for f in (loca, sdctft, fourierft, waveft)
}
EXAMPLES = 60


def slow(files: AdapterFiles, context: ParserContext) -> tuple[ParsedAdapter, Encoded] | None:
    """The slow twin; None if it refuses."""
    try:
        parsed = parse_adapter(files, context)
    except InvalidAdapter:
        return None
    parsed = replace(parsed, base_fingerprint=context.base.fingerprint)
    return parsed, encode(parsed)


def check_same(admitted: Admitted, parsed: ParsedAdapter, encoded: Encoded, context: ParserContext) -> None:
    assert admitted.encoded.digest == encoded.digest
    assert admitted.encoded.blob == encoded.blob
    assert dict(admitted.encoded.shared) == dict(encoded.shared)
    assert list(admitted.encoded.shared) == list(encoded.shared)
    kind = admitted.kind
    assert (kind.family, kind.parameter_count, kind.warnings) == (
        parsed.family,
        parsed.parameter_count,
        parsed.warnings,
    )
    assert (kind.module_count, kind.basis) == (len(parsed.deltas), parsed.basis)
    assert kind.base_model_name_or_path == parsed.base_model_name_or_path
    stored = decode(encoded.blob, context.base, InMemory(encoded.shared)).contents
    contents = admitted.contents
    assert isinstance(contents, Sparse)
    assert isinstance(stored, Sparse)
    assert admitted.resident_bytes == contents.nbytes == stored.nbytes
    assert_same(contents.values, stored.values)
    for name in ("rows", "cols"):
        assert_same(getattr(contents.patterns, name), getattr(stored.patterns, name))
    assert contents.deltas.keys() == stored.deltas.keys() == parsed.deltas.keys()
    for name, delta in parsed.deltas.items():
        assert_same(contents.deltas[name], delta)
        assert_same(stored.deltas[name], delta)


def check_kin(found: Kin) -> None:
    context = ParserContext(found.base)
    recipes = Recipes(context, Known())
    for i, files in enumerate(found.files):
        wanted, fast = slow(files, context), recipes.admit(files)
        if i == 0:
            assert fast is None, "nothing was learned yet"
            if wanted is None:
                return
            fast = recipes.learn(files)
        if wanted is None:
            assert fast is None, found.odd[i]
        else:
            assert fast is not None, found.odd[i]
            check_same(fast, *wanted, context)
            assert recipes.admit(files) is not None
    longer = replace(files, weights=files.weights + b"\0")
    assert recipes.admit(longer) is None
    assert recipes.admit(replace(files, weights=files.weights[:-1])) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twins_agree(family: str) -> None:
    @settings(
        deadline=None, derandomize=True, database=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck)
    )
    @given(kin(FAMILIES[family]()))
    def run(found: Kin) -> None:
        check_kin(found)

    run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_fraction_lands_where_the_slow_way_puts_it(dtype: torch.dtype) -> None:
    """Of large layers, of which two precisions find two frequencies; halves, the ends and what lies between them."""
    base = replace(BASE, modules={"q": (4096, 11_008)})
    context, recipes = ParserContext(base), Recipes(ParserContext(base), Known())
    config = json.dumps({"peft_type": "LOCA", "scale": -0.3}).encode()
    generator = torch.Generator().manual_seed(1)
    for i in range(4):
        t = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
        t[:, :6] = torch.tensor([0, 1, 0.999, 0.9990001, 0.5 / 4095, 1.5 / 4095])
        t[0, 6:1000] = (torch.arange(994) + 0.5) / 4095
        values = torch.randn(3000, generator=generator)
        tensors = {"base_model.model.q.spectrum": values, "base_model.model.q.spectrum_indices": t.to(dtype)}
        files = AdapterFiles(config, safetensors_file(tensors))
        wanted, fast = slow(files, context), recipes.admit(files) if i else recipes.learn(files)
        assert wanted is not None
        assert fast is not None
        check_same(fast, *wanted, context)


def test_only_what_is_alike_to_the_byte_has_a_recipe(tmp_path: Path) -> None:
    recipes = Recipes(ParserContext(BASE), Known())
    one, other = (adapter_files(make_loca_folder(tmp_path / str(seed), SHAPES, n=9, seed=seed)) for seed in (1, 2))
    recipes.learn(one)
    assert recipes.admit(other) is not None
    for changed in (
        replace(other, config=other.config + b" "),
        replace(other, weights=safetensors_file(load(other.weights))),
        replace(other, layout=replace(other.layout, peft_type="LOCA")),
        replace(other, weights=b""),
        replace(other, weights=b"\xff" * 100),
    ):
        assert recipes.admit(changed) is None


def test_what_is_shared_is_one_object(tmp_path: Path) -> None:
    """Layouts of all adapters of a recipe, locations of those with the same ones, both with what is read from disk."""
    known = Known()
    recipes = Recipes(ParserContext(BASE), known)
    files = adapter_files(make_sdctft_folder(tmp_path / "a", SHAPES, n=9, seed=1))
    tensors = load(files.weights)
    for name in tensors:
        if name.endswith("spectrum"):
            tensors[name] = tensors[name] * 2
    again = replace(files, weights=save(tensors, {"format": "pt"}))
    elsewhere = adapter_files(make_sdctft_folder(tmp_path / "b", SHAPES, n=9, seed=2))
    found = [recipes.learn(files), recipes.admit(again), recipes.admit(files), recipes.admit(elsewhere)]
    one, two, three, other = (one.contents for one in found if one is not None and isinstance(one.contents, Sparse))
    assert one.layout is two.layout is three.layout is other.layout
    assert two.patterns is three.patterns
    assert one.patterns.rows is two.patterns.rows is not other.patterns.rows
    assert one.patterns.cols is two.patterns.cols is not other.patterns.cols
    layout, places = found[0].encoded.shared if found[0] else ()
    assert known.layout(layout, BASE, lambda: b"") is one.layout
    assert known.places(places, one.layout, lambda: b"") is two.patterns
    assert (two.patterns.key, other.patterns.key) == (f"sha256:{places}", ""), "a key is for what is shared"


def test_a_family_without_recipes_is_admitted_the_slow_way() -> None:
    @settings(deadline=None, derandomize=True, database=None, max_examples=5, suppress_health_check=list(HealthCheck))
    @given(shira())
    def run(folder: Folder) -> None:
        config, weights = folder.files().values()
        files, context = AdapterFiles(config, weights), ParserContext(folder.base())
        recipes = Recipes(context, Known())
        admitted, wanted = recipes.learn(files), slow(files, context)
        assert wanted is not None
        check_same(admitted, *wanted, context)
        assert recipes.admit(files) is None

    run()


def test_tensors_of_several_dtypes_have_no_recipe(tmp_path: Path) -> None:
    files = adapter_files(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1))
    tensors = load(files.weights)
    name = next(name for name in tensors if name.endswith("spectrum"))
    mixed = replace(files, weights=save({**tensors, name: tensors[name].double()}))
    context = ParserContext(BASE)
    recipes, wanted = Recipes(context, Known()), slow(mixed, context)
    assert wanted is not None
    check_same(recipes.learn(mixed), *wanted, context)
    assert recipes.admit(mixed) is None


def test_a_strict_store_learns_nothing_of_what_it_refuses(tmp_path: Path) -> None:
    files = adapter_files(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1, base_name="another/base"))
    lenient, strict = (Recipes(ParserContext(BASE), Known(), strict_base=flag) for flag in (False, True))
    assert lenient.learn(files).kind.warnings
    assert lenient.admit(files) is not None
    with pytest.raises(BaseModelMismatch):
        strict.learn(files)
    assert strict.admit(files) is None
