"""What only some methods have: DCFT's penalty, starts at random, PiCa's shared matrix and basis, GPT-2's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.errors import BaseModelMismatch, InvalidRequest
from overtone.models.base import prepare
from overtone.tuning.methods import METHODS, DcftMethod, PicaMethod
from overtone.tuning.methods.attach import describe
from overtone.tuning.methods.dcft import DcftBranch
from overtone.tuning.methods.pica import PicaBranch
from support.adapters import adapter_files
from support.dense import deltas_in
from support.peft_base import base_of
from support.tiny import tiny_model, tiny_tokenizer
from support.tuned import Shapes, loss_of, parameters_of, perturb, small_method, tokens


@pytest.mark.parametrize("name", ["loca", "sdctft", "dcft", "pica"])
def test_no_branch_builds_its_delta(name: str) -> None:
    """The tiny model's layers have transforms by dense products of (q, q), so what is looked for is (p, q) itself."""
    model = tiny_model()
    tuned = small_method(name).attach(model, seed=0, total_steps=100)
    perturb(tuned)
    branch = model.get_submodule("model.layers.0.self_attn.v_proj").branch
    x = torch.randn(5, 64, requires_grad=True)
    with Shapes() as shapes:
        branch(x).sum().backward()
    assert (5, 48) in shapes.seen
    assert not {(48, 64), (64, 48)} & shapes.seen


def test_dcft_penalty_is_its_definition() -> None:
    model = tiny_model()
    tuned = DcftMethod(d=4, rank=2, reg=0.3, init="normal").attach(model, seed=0, total_steps=1)
    gaps = []
    for module in model.modules():
        if isinstance(module, DcftBranch):
            gaps.append((module.a @ module.a.T - torch.eye(2)).square().sum().sqrt())
            gaps.append((module.b.T @ module.b - torch.eye(2)).square().sum().sqrt())
    penalty = tuned.penalty()
    assert penalty is not None
    assert len(gaps) == 8
    torch.testing.assert_close(penalty, 0.3 * sum(gaps) / len(gaps))
    penalty.backward()
    assert DcftMethod(d=4, reg=0.0).attach(tiny_model(), seed=0, total_steps=1).penalty() is None
    drawn = torch.cat([parameter.detach().flatten() for parameter in parameters_of(tuned)])
    assert 0.017 < float(drawn.std()) < 0.023


def test_dcft_starts_where_its_penalty_is_zero() -> None:
    tuned = DcftMethod(d=4, rank=2).attach(tiny_model(), seed=0, total_steps=1)
    penalty = tuned.penalty()
    assert penalty is not None
    assert float(penalty.detach()) < 1e-6
    penalty.backward()
    assert all(bool(p.grad is None or p.grad.isfinite().all()) for p in parameters_of(tuned))


@pytest.mark.parametrize("name", ["sdctft", "dcft", "fourierft"])
def test_normal_start_is_not_the_base(name: str) -> None:
    tuned = small_method(name, init="normal").attach(tiny_model(), seed=0, total_steps=1)
    assert all(bool(delta.any()) for delta in tuned.deltas().values())
    other = small_method(name, init="normal").attach(tiny_model(), seed=1, total_steps=1)
    assert all(not torch.equal(delta, tuned.deltas()[module]) for module, delta in other.deltas().items())


def test_pica_has_one_matrix_for_all_layers_of_a_kind(tmp_path: Path) -> None:
    model = tiny_model()
    tuned = PicaMethod(rank=4, projector_folder=tmp_path / "bases").attach(model, seed=0, total_steps=1)
    assert tuned.trainable_parameters == 4 * (96 + 48)
    branches = {n: m for n, m in model.named_modules() if isinstance(m, PicaBranch) and "q_proj" in n}
    assert len({id(branch.m) for branch in branches.values()}) == 1
    for name, branch in branches.items():
        weight = tiny_model().get_submodule(name.removesuffix(".branch")).weight
        assert torch.equal(branch.basis, torch.linalg.svd(weight, full_matrices=False)[2][:4])
    loss_of(model, tokens()).backward()
    assert all(bool(parameter.grad is not None and parameter.grad.any()) for parameter in parameters_of(tuned))
    # The server's routine finds what is kept, by the same fingerprint.
    fingerprint = describe(tiny_model()).fingerprint
    assert len(list((tmp_path / "bases" / fingerprint[:16]).glob("*.safetensors"))) == 4
    assert fingerprint == prepare(tiny_model(), tiny_tokenizer(), "tiny").fingerprint


@pytest.mark.parametrize("include", [True, False])
def test_pica_folder_brings_its_basis_or_pins_it(include: bool, tmp_path: Path) -> None:
    tuned = PicaMethod(rank=4, include_basis=include).attach(tiny_model(), seed=0, total_steps=1)
    perturb(tuned)
    tuned.save(tmp_path, "example/tiny")
    for seed, fits in ((0, True), (1, include)):
        base = base_of(tiny_model(seed=seed))
        context = ParserContext(base, projectors=Projectors(None, base))
        if fits:
            assert parse_adapter(adapter_files(tmp_path), context).basis == ("own" if include else "pinned")
        else:
            with pytest.raises(BaseModelMismatch, match="basis_sha256 is"):
                parse_adapter(adapter_files(tmp_path), context)


def test_pica_refuses_kinds_that_mean_more_in_the_server() -> None:
    model = tiny_model()
    model.model.layers[0].self_attn.not_q_proj = torch.nn.Linear(64, 96)
    with pytest.raises(InvalidRequest, match=r"also a part of the name .*not_q_proj") as caught:
        PicaMethod(rank=2, targets=["q_proj"]).attach(model, seed=0, total_steps=1)
    assert caught.value.field == "targets"
    with pytest.raises(InvalidRequest, match="one M for all"):
        PicaMethod(rank=2, targets=["layers.0.mlp.up_proj", "self_attn.q_proj"], include_basis=True).attach(
            _with_other_outputs(), seed=0, total_steps=1
        )


def _with_other_outputs() -> Any:
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(64, 40)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_conv1d_of_gpt2_is_a_linear_layer(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        return tiny_model("gpt2", n_inner=96)

    model = make()
    tuned = small_method(name, targets=["c_attn", "mlp.c_proj"]).attach(model, seed=0, total_steps=10)
    perturb(tuned)
    tuned.save(tmp_path, "example/tiny")
    deltas = tuned.deltas()
    assert deltas["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert deltas["transformer.h.1.mlp.c_proj"].shape == (64, 96)
    for module, delta in deltas.items():
        x = torch.randn(3, delta.shape[1])
        with torch.no_grad():
            change = model.get_submodule(module)(x) - make().get_submodule(module)(x)
        torch.testing.assert_close(change, x @ delta.T, rtol=1e-4, atol=1e-4)
    if name != "pica":
        for module, expected in deltas_in(tmp_path, make()).items():
            torch.testing.assert_close(deltas[module].T.double(), expected, rtol=1e-4, atol=1e-5)
    base = describe(make())
    parsed = parse_adapter(adapter_files(tmp_path), ParserContext(base, projectors=Projectors(None, base)))
    assert parsed.deltas.keys() == deltas.keys()
