"""PiCa against delta_W = M P in float64 from the definition, P by the authors' call; substrings, bases, broken files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from overtone.adapters import AdapterFiles, BaseDescription, ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.families.pica import basis_digest
from overtone.adapters.files import PICA_LAYOUT
from overtone.adapters.projectors import BASE_SVD, Projectors
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import FrameBank, FrameKind, prepare, reference, sound
from support.peft_base import base_of
from support.tiny import tiny_model

RELATIVE = 1e-6
Tensors = Mapping[str, torch.Tensor]
OUTPUTS = {"q_proj": 96, "k_proj": 48, "v_proj": 48, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}
FIRST, SECOND = "model.layers.0.", "model.layers.1."


@functools.cache
def _tiny() -> Any:
    return tiny_model()


@functools.cache
def _base() -> BaseDescription:
    return base_of(_tiny())


@functools.cache
def _context() -> ParserContext:
    return ParserContext(_base(), projectors=Projectors(None, _base()))


def _matrices(kinds: Mapping[str, int], rank: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """M by kind: (p, rank). kinds: name -> p."""
    generator = torch.Generator().manual_seed(rank)
    return {kind: torch.randn(p, rank, generator=generator).to(dtype) for kind, p in kinds.items()}


def _files(tensors: Tensors, **keys: Any) -> AdapterFiles:
    """`keys` beside a rank and target_modules that fit; ... for a key leaves it out."""
    kinds = [name for name in tensors if not name.startswith("basis.")]
    rank = next(iter(tensors.values())).shape[-1] if tensors else 4
    config = {"target_modules": kinds, "rank": rank, "base_model_name_or_path": "example/tiny", **keys}
    raw = json.dumps({key: value for key, value in config.items() if value is not ...}).encode()
    return AdapterFiles(raw, save({n: t.clone().contiguous() for n, t in tensors.items()}), PICA_LAYOUT)


def _parse(files: AdapterFiles) -> ParsedAdapter:
    return parse_adapter(files, _context())


def _vectors(module: str, rank: int) -> torch.Tensor:
    """As the authors compute P."""
    return torch.linalg.svd(_base().weight(module).float(), full_matrices=False)[2][:rank]


def assert_is(parsed: ParsedAdapter, expected: Mapping[str, torch.Tensor]) -> None:
    assert parsed.deltas.keys() == expected.keys()
    for module, delta in parsed.deltas.items():
        got = reference.dense_delta(delta)
        assert got.shape == expected[module].shape == _base().modules[module]
        assert float((got - expected[module]).norm()) <= RELATIVE * float(expected[module].norm()), module
        assert all(sound(term.core) for term in delta.terms)


@pytest.mark.parametrize("rank", [1, 7, 48])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_layers(rank: int, dtype: torch.dtype) -> None:
    matrices = _matrices(OUTPUTS, rank, dtype)
    parsed = _parse(_files(matrices))
    expected = {}
    for kind, matrix in matrices.items():
        for module in (name for name in _base().modules if name.endswith(kind)):
            expected[module] = matrix.double() @ _vectors(module, rank).double()
    assert len(expected) == 14
    assert_is(parsed, expected)
    numbers = sum(OUTPUTS.values()) * rank
    assert (parsed.family, parsed.basis, parsed.parameter_count, parsed.warnings) == ("pica", "assumed", numbers, ())
    core = parsed.deltas[FIRST + "self_attn.q_proj"].terms[0].core
    assert core.matrix.dtype == (torch.float32 if dtype == torch.float64 else dtype)


def test_the_authors_rank_by_default() -> None:
    base = BaseDescription("b", "f" * 64, {"m": (300, 280)}, weight=lambda _: torch.eye(300, 280))
    context = ParserContext(base, projectors=Projectors(None, base))
    delta = parse_adapter(_files({"m": torch.ones(300, 256)}, rank=...), context).deltas["m"]
    assert delta.terms[0].core.shape == (300, 256)


def test_layers_of_a_kind_share_one_core_and_adapters_one_basis(tmp_path: Path) -> None:
    context = ParserContext(_base(), projectors=Projectors(tmp_path, _base()))
    parsed = [parse_adapter(_files(_matrices({"q_proj": 96, "o_proj": 64}, r)), context) for r in (3, 20)]
    for adapter in parsed:
        cores = {module: id(delta.terms[0].core) for module, delta in adapter.deltas.items()}
        assert len(cores) == 4
        assert len(set(cores.values())) == 2
        assert cores[FIRST + "self_attn.q_proj"] == cores[SECOND + "self_attn.q_proj"]
    for module in parsed[0].deltas:
        frames = [adapter.deltas[module].terms[0].analysis for adapter in parsed]
        assert frames[0].kind is FrameKind.PROJECTION
        assert frames[0].shared is not None
        assert frames[0].shared is frames[1].shared
        assert frames[0].shared.key == BASE_SVD + module


def test_nested_ranks_and_the_fast_path() -> None:
    """More rows than the adapter's rank in the shared matrix change nothing."""
    module, bank = FIRST + "mlp.down_proj", FrameBank(torch.device("cpu"))
    matrix = _matrices({"down_proj": 64}, 40)["down_proj"]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    for rank in (1, 17, 40):
        delta = _parse(_files({"down_proj": matrix[:, :rank]})).deltas[module]
        (term,) = delta.terms
        core = prepare(term.core)
        y = bank.synthesise(term.synthesis, core.apply(bank.analyse(term.analysis, x, core.shape[1])), 64)
        expected = x.double() @ (matrix[:, :rank].double() @ _vectors(module, rank).double()).T
        assert float((y - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize(
    ("kinds", "winners"),
    [
        ({"proj": 64}, None),  # layers of other sizes, too
        ({"mlp.down": 64, "layers.1.self_attn.o": 64}, {FIRST + "mlp.down_proj": "mlp.down"}),
        ({"layers.0.mlp.up_proj": 96, "up_proj": 96}, {FIRST + "mlp.up_proj": "layers.0.mlp.up_proj"}),
        ({"_proj.x": 64}, None),
        ({"lm_head": 266}, {"lm_head": "lm_head"}),
        ({"head": 266}, {"lm_head": "head"}),
    ],
)
def test_entries_are_substrings(kinds: dict[str, int], winners: dict[str, str] | None) -> None:
    matrices = _matrices(kinds, 5)
    if winners is None:
        with pytest.raises(InvalidAdapter):
            _parse(_files(matrices))
        return
    parsed = _parse(_files(matrices))
    for module, kind in winners.items():
        assert torch.equal(parsed.deltas[module].terms[0].core.matrix, matrices[kind])


def test_the_first_entry_wins() -> None:
    """In the order of target_modules, which is neither that of the file nor that of the lengths."""
    matrices = _matrices({"layers.0.mlp.gate": 96, "gate_proj": 96}, 5)
    order = ["layers.0.mlp.gate", "gate_proj"]
    parsed = _parse(_files({kind: matrices[kind] for kind in order[::-1]}, target_modules=order))
    expected = {FIRST + "mlp.gate_proj": order[0], SECOND + "mlp.gate_proj": order[1]}
    assert_is(parsed, {m: matrices[k].double() @ _vectors(m, 5).double() for m, k in expected.items()})
    with pytest.raises(InvalidAdapter, match=r"layers\.0\.mlp\.gate") as caught:
        _parse(_files(matrices, target_modules=order[::-1]))
    assert caught.value.field == "target_modules"  # of which the first entry leaves nothing to the second


def _digest(rows: Mapping[str, torch.Tensor]) -> str:
    """basis_sha256 as its definition says."""
    told = b"".join(
        name.encode() + b"\0" + rows[name].contiguous().numpy().astype("<f4").tobytes() for name in sorted(rows)
    )
    return hashlib.sha256(told).hexdigest()


def test_a_pinned_basis() -> None:
    matrices = _matrices({"q_proj": 96, "down_proj": 64}, 6)
    modules = [name for name in _base().modules if name.endswith(("q_proj", "down_proj"))]
    vectors = {module: _vectors(module, 6) for module in modules}
    parsed = _parse(_files(matrices, basis_sha256=_digest(vectors)))
    assert parsed.basis == "pinned"
    assert basis_digest({module: _vectors(module, 9) for module in modules}, 6) == _digest(vectors)
    assert _parse(_files(matrices, basis_sha256=None)).basis == "assumed"


@pytest.mark.parametrize("own", [False, True])
def test_another_basis_than_the_pinned_one(own: bool) -> None:
    """A single sign: what another routine may give."""
    matrices = _matrices({"q_proj": 96}, 6)
    modules = [name for name in _base().modules if name.endswith("q_proj")]
    vectors = {module: _vectors(module, 6) for module in modules}
    flipped = {**vectors, modules[1]: vectors[modules[1]] * torch.tensor([[1.0]] * 5 + [[-1.0]])}
    bases = {f"basis.{module}": rows for module, rows in vectors.items()} if own else {}
    with pytest.raises(BaseModelMismatch) as caught:
        _parse(_files({**matrices, **bases}, basis_sha256=_digest(flipped)))
    assert caught.value.field == "basis_sha256"
    assert _digest(flipped)[:12] in caught.value.message
    assert _digest(vectors)[:12] in caught.value.message


def _own_basis(kinds: tuple[str, ...], rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    modules = [name for name in _base().modules if name.endswith(kinds)]
    return {
        f"basis.{m}": torch.linalg.qr(torch.randn(_base().modules[m][1], rows, generator=generator))[0].T.contiguous()
        for m in modules
    }


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_own_basis(extra: int, dtype: torch.dtype) -> None:
    """Nothing of the base model is computed, and adapters with the same basis share it."""
    matrices = _matrices({"q_proj": 96, "down_proj": 64}, 6)
    bases = {name: rows.to(dtype) for name, rows in _own_basis(("q_proj", "down_proj"), 6 + extra).items()}
    context = ParserContext(_base())  # without projectors
    parsed = [parse_adapter(_files({**matrices, **bases}), context) for _ in range(2)]
    expected = {}
    for name, rows in bases.items():
        kind = "q_proj" if name.endswith("q_proj") else "down_proj"
        expected[name.removeprefix("basis.")] = matrices[kind].double() @ rows[:6].double()
    assert_is(parsed[0], expected)
    assert (parsed[0].basis, parsed[0].parameter_count) == ("own", 6 * (96 + 64))
    for module in expected:
        shared = [adapter.deltas[module].terms[0].analysis.shared for adapter in parsed]
        assert shared[0] is not None
        assert shared[0] is shared[1]
        assert shared[0].key.startswith("sha256:")
    pinned = {name.removeprefix("basis."): rows[:6].float() for name, rows in bases.items()}
    assert parse_adapter(_files({**matrices, **bases}, basis_sha256=_digest(pinned)), context).basis == "own"


def test_a_base_of_which_the_weights_are_not_at_hand() -> None:
    with pytest.raises(UnsupportedAdapter):
        parse_adapter(_files(_matrices({"q_proj": 96}, 2)), ParserContext(_base()))


Q_BASIS = f"basis.{FIRST}self_attn.q_proj"
M = _matrices({"q_proj": 96}, 6)
NAN, INF = float("nan"), float("inf")

BROKEN: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "no targets": ({"target_modules": ...}, {}, InvalidAdapter, "target_modules"),
    "targets null": ({"target_modules": None}, {}, InvalidAdapter, "target_modules"),
    "an expression": ({"target_modules": "q_proj"}, {}, InvalidAdapter, "target_modules"),
    "no entries": ({"target_modules": []}, {}, InvalidAdapter, "target_modules"),
    "an empty entry": ({"target_modules": ["q_proj", ""]}, {}, InvalidAdapter, "target_modules"),
    "an entry twice": ({"target_modules": ["q_proj", "q_proj"]}, {}, InvalidAdapter, "target_modules"),
    "a number": ({"target_modules": ["q_proj", 1]}, {}, InvalidAdapter, "target_modules"),
    "an entry called as a basis": ({"target_modules": ["q_proj", "basis.x"]}, {}, InvalidAdapter, "target_modules"),
    "an entry without a tensor": ({"target_modules": ["q_proj", "k_proj"]}, {}, InvalidAdapter, "target_modules"),
    "an entry without layers": (
        {"target_modules": ["q_proj", "w_q"]}, {"w_q": torch.ones(96, 6)}, InvalidAdapter, "target_modules"
    ),
    "an embedding": (
        {"target_modules": ["q_proj", "embed"]}, {"embed": torch.ones(64, 6)}, InvalidAdapter, "target_modules"
    ),
    "layers of other sizes": ({"target_modules": ["self_attn"]}, {"q_proj": None, "self_attn": torch.ones(96, 6)},
                              InvalidAdapter, "self_attn"),
    "a tensor without an entry": ({}, {"k_proj": torch.ones(48, 6)}, InvalidAdapter, "k_proj"),
    "a tensor called as PEFT does": (
        {}, {"base_model.model.q_proj": torch.ones(96, 6)}, InvalidAdapter, "base_model.model.q_proj"
    ),
    "no tensors": ({}, {"q_proj": None}, InvalidAdapter, "target_modules"),
    "rank 0": ({"rank": 0}, {}, InvalidAdapter, "rank"),
    "rank null": ({"rank": None}, {}, InvalidAdapter, "rank"),
    "another rank": ({"rank": 7}, {}, InvalidAdapter, "q_proj"),
    "a rank of billions": ({"rank": 10**12}, {}, InvalidAdapter, "q_proj"),
    "a rank that layers do not have": ({"rank": 65}, {"q_proj": torch.ones(96, 65)}, InvalidAdapter, "rank"),
    "M of other outputs": ({}, {"q_proj": torch.ones(95, 6)}, InvalidAdapter, "q_proj"),
    "M turned": ({}, {"q_proj": torch.ones(6, 96)}, InvalidAdapter, "q_proj"),
    "M as a vector": ({}, {"q_proj": torch.ones(576)}, InvalidAdapter, "q_proj"),
    "M of integers": ({}, {"q_proj": torch.ones(96, 6).int()}, InvalidAdapter, "q_proj"),
    "NaN in M": ({}, {"q_proj": torch.full((96, 6), NAN)}, NonFiniteAdapter, "q_proj"),
    "M too large for float32": (
        {}, {"q_proj": torch.full((96, 6), 1e300, dtype=torch.float64)}, NonFiniteAdapter, "q_proj"
    ),
    "a digest that is none": ({"basis_sha256": "abc"}, {}, InvalidAdapter, "basis_sha256"),
    "a digest in capitals": ({"basis_sha256": "A" * 64}, {}, InvalidAdapter, "basis_sha256"),
    "another digest": ({"basis_sha256": "a" * 64}, {}, BaseModelMismatch, "basis_sha256"),
    "another base": ({"base_fingerprint": "a" * 64}, {}, BaseModelMismatch, "base_fingerprint"),
    "a scale": ({"scale": 1.0}, {}, InvalidAdapter, "scale"),
    "only some layers": ({"layers_to_transform": [0]}, {}, UnsupportedAdapter, "layers_to_transform"),
    "not all layers": ({"exclude_modules": "lm_head"}, {}, UnsupportedAdapter, "exclude_modules"),
    "a pattern": ({"layers_pattern": "layers"}, {}, UnsupportedAdapter, "layers_pattern"),
}  # fmt: skip

BROKEN_BASES: dict[str, tuple[dict[str, torch.Tensor | None], type[InvalidAdapter], str]] = {
    "one missing": ({Q_BASIS: None}, InvalidAdapter, Q_BASIS),
    "one of another layer": ({"basis.lm_head": torch.eye(6, 64)}, InvalidAdapter, "basis.lm_head"),
    "one of no layer": ({"basis.": torch.eye(6, 64)}, InvalidAdapter, "basis."),
    "too few rows": ({Q_BASIS: torch.eye(5, 64)}, InvalidAdapter, Q_BASIS),
    "more rows than columns": ({Q_BASIS: torch.ones(65, 64)}, InvalidAdapter, Q_BASIS),
    "too wide": ({Q_BASIS: torch.eye(6, 65)}, InvalidAdapter, Q_BASIS),
    "too narrow": ({Q_BASIS: torch.eye(6, 63)}, InvalidAdapter, Q_BASIS),
    "a vector": ({Q_BASIS: torch.ones(384)}, InvalidAdapter, Q_BASIS),
    "longer rows": ({Q_BASIS: 1.001 * torch.eye(6, 64)}, InvalidAdapter, Q_BASIS),
    "a last row that is none": ({Q_BASIS: torch.eye(8, 64) * (torch.arange(8) < 7)[:, None]}, InvalidAdapter, Q_BASIS),
    "a row twice": ({Q_BASIS: torch.eye(6, 64)[[0, 1, 2, 3, 4, 4]]}, InvalidAdapter, Q_BASIS),
    "integers": ({Q_BASIS: torch.eye(6, 64).int()}, InvalidAdapter, Q_BASIS),
    "NaN": ({Q_BASIS: torch.full((6, 64), NAN)}, NonFiniteAdapter, Q_BASIS),
    "squares beyond float32": ({Q_BASIS: torch.full((6, 64), 1e30)}, InvalidAdapter, Q_BASIS),
}


def _refused(tensors: Mapping[str, torch.Tensor | None], keys: dict[str, Any], error: type, field: str) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InvalidAdapter) as caught:
        _parse(_files(kept, **{"target_modules": ["q_proj"], "rank": 6, **keys}))
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(name: str) -> None:
    keys, tensors, error, field = BROKEN[name]
    _refused({**M, **tensors}, keys, error, field)


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_bases_that_are_refused(name: str) -> None:
    tensors, error, field = BROKEN_BASES[name]
    _refused({**M, **_own_basis(("q_proj",), 6), **tensors}, {}, error, field)


def test_keys_that_say_nothing_new() -> None:
    keys = {"peft_type": "PICA", "inference_mode": True, "layers_to_transform": None, "exclude_modules": []}
    assert len(_parse(_files(M, base_fingerprint="f" * 64, **keys)).deltas) == 2
