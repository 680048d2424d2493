"""Any adapter as LoRA: against delta_W by its definition, the best approximation there is, and PEFT itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from overtone.adapters import ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.bridges import Choice, Draft, Exported, normalised, read_source, to_lora, write_folder
from overtone.adapters.bridges.factors import dense_term
from overtone.adapters.bridges.lora_folder import pattern_of, target_modules
from overtone.adapters.bridges.low_rank import fit
from overtone.adapters.bridges.singular import leading, randomised
from overtone.adapters.projectors import Projectors
from overtone.errors import InvalidRequest, NonFiniteAdapter
from overtone.kernels import DCT, DFT, IDENTITY, Delta, Frame, LowRankCore, Term, reference
from support.all_families import FAMILIES, projections
from support.cores import random_core
from support.dense import deltas_in
from support.peft_base import base_of
from support.peft_folders import peft_deltas, peft_folder
from support.terms import KINDS, RandomTerms
from support.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")  # PEFT's, of save_projection=False

RELATIVE = 1e-6
SHAPES = [(96, 64), (48, 64), (64, 96), (44, 68)]
FULL = {"weight", "circulant", "modulated", "modulated_transposed"}
"""Kinds of terms that have no exact form of low rank."""
EXACT = {"lora", "rslora", "dcft", "pica", "vera", "vera-unsaved", "vblora", "vblora-top"}


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def no_weight() -> torch.Tensor:
    raise AssertionError("this delta needs no weight")


def best_error(dense: torch.Tensor, rank: int) -> float:
    """Eckart and Young: the norm of what is beyond the leading singular values."""
    return float(torch.linalg.svdvals(dense)[rank:].norm())


@functools.cache
def _tiny() -> Any:
    """To read only."""
    return tiny_model()


def context() -> ParserContext:
    base = base_of(_tiny())
    return ParserContext(base, projectors=Projectors(None, base))


def parse(folder: Path) -> tuple[ParsedAdapter, Mapping[str, object]]:
    draft = normalised(Draft.of(read_source(folder)))
    return parse_adapter(draft.files(), context()), draft.config


def exported(folder: Path, target: Path, choice: Choice) -> Exported:
    parsed, config = parse(folder)
    found = to_lora(parsed, base_of(_tiny()), config, choice)
    write_folder(target, found.files)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_term(kind: str, shape: tuple[int, int]) -> None:
    delta = Delta((RandomTerms(shape, 3).make(kind),), shape)
    weight = random_weight(shape)
    wanted = reference.dense_delta(delta, weight)
    dense = dense_term(delta.terms[0], shape, lambda: weight)
    assert float((dense - wanted).norm()) <= 1e-13 * float(wanted.norm())
    if kind in FULL:
        with pytest.raises(InvalidRequest, match="--rank") as caught:
            fit("m", delta, lambda: weight, Choice())
        assert caught.value.field == "rank"
    else:
        found = fit("m", delta, lambda: weight, Choice())
        assert found.exact
        assert 2 * found.rank <= min(shape)
        assert_fits(found, wanted, RELATIVE * float(wanted.norm()))


def assert_fits(found: Any, wanted: torch.Tensor, bound: float) -> None:
    error = float((wanted - found.b.double() @ found.a.double()).norm())
    assert error <= bound
    assert found.error == pytest.approx(error, rel=1e-9, abs=1e-12 * float(wanted.norm()))
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_is_cut_best(kind: str, shape: tuple[int, int]) -> None:
    delta = Delta((RandomTerms(shape, 4).make(kind),), shape)
    weight = random_weight(shape)
    wanted = reference.dense_delta(delta, weight)
    for rank in (1, 2, 7):
        found = fit("m", delta, lambda: weight, Choice(rank=rank, truncate=True))
        assert found.rank <= rank
        best = best_error(wanted, rank)
        assert found.error <= best * (1 + 1e-6) + RELATIVE * float(wanted.norm())
        assert_fits(found, wanted, best * (1 + 1e-6) + RELATIVE * float(wanted.norm()))


@pytest.mark.parametrize(
    ("kinds", "exact"),
    [
        (["low_rank", "kronecker"], True),
        (["dct", "gained_low_rank", "dense"], True),
        (["weight", "low_rank"], False),
        (["dct", "weight"], False),
    ],
)
def test_sums(kinds: list[str], exact: bool) -> None:
    shape = (96, 64)
    terms = RandomTerms(shape, 6)
    delta, weight = Delta(tuple(terms.make(kind) for kind in kinds), shape), random_weight(shape)
    wanted = reference.dense_delta(delta, weight)
    found = fit("m", delta, lambda: weight, Choice(rank=9))
    assert found.exact == exact
    assert found.rank > 9 if exact else found.rank == 9
    assert_fits(found, wanted, RELATIVE * float(wanted.norm()) + (0 if exact else best_error(wanted, 9) * (1 + 1e-6)))


@pytest.mark.parametrize("frame", [DCT, IDENTITY])
@pytest.mark.parametrize("gained", [False, True])
def test_many_coefficients(frame: Frame, gained: bool) -> None:
    """Too many rows and columns for an exact form, with and without a gain, which no orthonormal frame survives."""
    generator = torch.Generator().manual_seed(2)
    core, gain = random_core((96, 64), 900, generator), torch.randn(96, generator=generator)
    delta = Delta((Term(frame, core, frame, gain if gained else None),), (96, 64))
    wanted = reference.dense_delta(delta)
    found = fit("m", delta, no_weight, Choice(rank=20))
    assert (found.rank, found.exact) == (20, False)
    assert_fits(found, wanted, best_error(wanted, 20) * (1 + 1e-6))
    whole = fit("m", delta, no_weight, Choice(rank=64))
    assert_fits(whole, wanted, RELATIVE * float(wanted.norm()))


def test_more_rank_than_a_layer_has() -> None:
    """Exact at the rank of the layer, on either side."""
    for shape in ((4, 40), (40, 4)):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(9, shape[1], generator=generator), torch.randn(shape[0], 9, generator=generator)
        delta = Delta((Term(IDENTITY, LowRankCore(a, b, 0.5), IDENTITY),), shape)
        found = fit("m", delta, no_weight, Choice())
        assert (found.rank, found.exact) == (4, True)
        wanted = reference.dense_delta(delta)
        assert_fits(found, wanted, RELATIVE * float(wanted.norm()))


def test_a_larger_exact_rank_is_kept_unless_told() -> None:
    delta = Delta((RandomTerms((96, 64), 1).make("kronecker"),), (96, 64))
    ranks = {cut: fit("m", delta, no_weight, Choice(rank=3, truncate=cut)).rank for cut in (False, True)}
    assert ranks == {False: 8, True: 3}


def test_few_rows_are_few_ranks() -> None:
    """A thousand coefficients in five rows; and coefficients that are one row twice over have one rank."""
    generator = torch.Generator().manual_seed(0)
    core = random_core((5, 300), 1000, generator)
    rows = torch.tensor([0, 3, 250, 7, 299])[core.rows.long()]
    for frame, size in ((DCT, 300), (DFT, 302)):
        wide = random_core((size, size), 1, generator)
        pattern = type(wide.pattern)(rows.to(torch.int32), core.cols, (size, size))
        delta = Delta((Term(frame, type(wide)(pattern, core.values), frame),), (300, 300))
        found = fit("m", delta, no_weight, Choice())
        wanted = reference.dense_delta(delta)
        assert (found.rank, found.exact) == (5, True)
        assert_fits(found, wanted, RELATIVE * float(wanted.norm()))


def test_a_delta_of_zero() -> None:
    for core in (LowRankCore(torch.randn(2, 6), torch.zeros(4, 2)), random_core((4, 6), 2, torch.Generator())):
        if not isinstance(core, LowRankCore):
            core = type(core)(core.pattern, core.values * 0)
        found = fit("m", Delta((Term(IDENTITY, core, IDENTITY),), (4, 6)), no_weight, Choice())
        assert (found.relative_error, found.norm) == (0, 0)
        assert found.rank >= 1


def test_narrow_numbers_are_measured_as_stored() -> None:
    delta = Delta((RandomTerms((96, 64), 2).make("dct"),), (96, 64))
    wanted = reference.dense_delta(delta)
    for dtype, least, most in ((torch.bfloat16, 5e-4, 8e-3), (torch.float16, 5e-5, 1e-3)):
        found = fit("m", delta, no_weight, Choice(dtype=dtype))
        assert found.b.dtype == found.a.dtype == dtype
        assert least <= found.relative_error <= most
        assert_fits(found, wanted, most * float(wanted.norm()))
    huge = Delta((Term(IDENTITY, LowRankCore(torch.ones(1, 6), torch.full((4, 1), 1e6)), IDENTITY),), (4, 6))
    with pytest.raises(NonFiniteAdapter, match="float16") as caught:
        fit("model.m", huge, no_weight, Choice(dtype=torch.float16))
    assert caught.value.field == "model.m"


def test_the_randomised_decomposition_is_nearly_the_best() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 200, dtype=torch.float64, generator=generator)).Q for n in (700, 300))
    matrix = u * torch.linspace(3, 0, 200, dtype=torch.float64).exp() @ v.T
    for rank in (1, 20, 150):
        for make in (leading, randomised):
            found = make(matrix, rank)
            error = float((matrix - found.u * found.s @ found.v.T).norm())
            assert error <= best_error(matrix, rank) * (1 + (1e-9 if make is leading else 2e-3)) + 1e-5
            assert found.s.shape == (rank,)
    assert torch.equal(randomised(matrix, 20).u, randomised(matrix, 20).u)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_takes_every_family(tmp_path: Path, name: str) -> None:
    """What PEFT merges of the exported folder is the adapter's delta_W, or as near as the measured error says."""
    model = _tiny()
    modules = [m for m in projections(model, [0, 1]) if not m.endswith("1.mlp.up_proj")]
    wanted = deltas_in(FAMILIES[name](tmp_path / "source", model, modules, 0.3), model)
    found = exported(tmp_path / "source", tmp_path / "target", Choice(rank=24))
    got = peft_deltas(tmp_path / "target", model)
    assert got.keys() == wanted.keys() == found.modules.keys()
    assert all(fitted.exact == (name in EXACT) for fitted in found.modules.values())
    squares = 0.0
    for module, fitted in found.modules.items():
        error, norm = float((got[module] - wanted[module]).norm()), float(wanted[module].norm())
        best = 0.0 if fitted.exact else best_error(wanted[module], 24)
        assert error <= best * (1 + 1e-5) + RELATIVE * norm, module
        assert fitted.relative_error == pytest.approx(error / norm, rel=1e-4, abs=RELATIVE)
        squares += error**2
    total = sum(float(delta.square().sum()) for delta in wanted.values())
    assert found.relative_error == pytest.approx((squares / total) ** 0.5, rel=1e-4, abs=RELATIVE)
    assert_parses_alike(found, tmp_path / "target")


def assert_parses_alike(found: Exported, target: Path) -> None:
    """Our own LoRA parser reads the same pairs, at scale 1."""
    parsed, _ = parse(target)
    assert (parsed.family, parsed.parameter_count) == ("lora", found.parameter_count)
    for module, fitted in found.modules.items():
        core = parsed.deltas[module].terms[0].core
        assert isinstance(core, LowRankCore)
        assert core.scale == 1
        assert torch.equal(core.a, fitted.a)
        assert torch.equal(core.b, fitted.b)


def test_embeddings_heads_and_many_ranks(tmp_path: Path) -> None:
    import peft

    model = _tiny()
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "layers_to_transform": None}
    config = peft.LoraConfig(r=3, rank_pattern={"lm_head": 5, "layers.1.self_attn.q_proj": 2}, lora_alpha=7, **settings)
    source = peft_folder(tmp_path / "source", model, config)
    found = exported(source, tmp_path / "target", Choice())
    wanted, got = peft_deltas(source, model), peft_deltas(tmp_path / "target", model)
    assert got.keys() == wanted.keys()
    assert all(float((got[m] - wanted[m]).norm()) <= RELATIVE * float(wanted[m].norm()) for m in wanted)
    written = json.loads((tmp_path / "target" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]
    assert (written["r"], written["lora_alpha"]) == (3, 3)
    assert written["rank_pattern"] == written["alpha_pattern"] == {"lm_head": 5, "model.layers.1.self_attn.q_proj": 2}
    assert written.keys() == json.loads((source / "adapter_config.json").read_text()).keys()
    assert_parses_alike(found, tmp_path / "target")


NAMES = ["a.q", "a.k", "b.a.q", "b.c", "b_c", "x.b.c", "lm_head", "d.lm_head", "q", "a+b.(q", "z.a+b.(q"]


@pytest.mark.parametrize("seed", range(40))
def test_patterns_and_targets_mean_to_peft_what_they_should(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 4, (len(NAMES),), generator=generator).tolist()
    ranks = {name: pick for name, pick in zip(NAMES, picks, strict=True) if pick}
    for default in (1, 2):
        pattern = pattern_of(ranks, default)
        for name, rank in ranks.items():
            assert pattern.get(get_pattern_key(list(pattern), name), default) == rank
    config = SimpleNamespace(target_modules=target_modules(ranks, NAMES))
    assert {name for name in NAMES if check_target_module_exists(config, name)} == set(ranks)


def test_where_it_came_from_stays(tmp_path: Path) -> None:
    source = FAMILIES["dcft"](tmp_path / "a", _tiny(), projections(_tiny(), [0]), 0.3)
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "example/tiny", "task_type": "CAUSAL_LM", "revision": "main"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    parsed, kept = parse(source)
    seen: list[str] = []
    found = to_lora(parsed, base_of(_tiny()), kept, Choice(), seen.append)
    assert seen == list(parsed.deltas)
    written = json.loads(found.files.config)
    assert {key: written[key] for key in ("base_model_name_or_path", "task_type", "revision")} == {
        "base_model_name_or_path": "example/tiny",
        "task_type": "CAUSAL_LM",
        "revision": "main",
    }
    assert written["target_modules"] == sorted(projections(_tiny(), [0]))
