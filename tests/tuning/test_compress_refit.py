"""Values fitted to activations: against least squares on the dense problem, row by row and as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from overtone.kernels.reference import dct_matrix
from overtone.tuning.compress.choosing import Selection, choose_each
from overtone.tuning.compress.moments import Features, Moments, in_parts, measure
from overtone.tuning.compress.refit import features_of, refit
from overtone.tuning.compress.spectra import DenseSpectrum, Spectrum, dense, low_rank
from support.compressing import FakeSource, delta_of, random_pair

P, Q, TOKENS = 24, 40, 60
KINDS = ["low rank", "dense"]


def inputs(correlated: bool) -> torch.Tensor:
    """X (q, tokens) float64."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(Q, TOKENS, generator=generator, dtype=torch.float64)
    if not correlated:
        return x
    return torch.randn(Q, 3, generator=generator, dtype=torch.float64) @ x[:3] + 0.05 * x


def made(kind: str, n: int = 90) -> tuple[torch.Tensor, Spectrum, Selection]:
    """(delta_W, its spectrum, its n largest coefficients)"""
    b, a = (t.double() for t in random_pair((P, Q), 3, seed=7, strength=1.0))
    spectrum: Spectrum = low_rank(b, a) if kind == "low rank" else dense(b @ a)
    return b @ a, spectrum, choose_each(FakeSource({"": spectrum}), n, lambda stage, module: None)[""]


def moments_of(features: Features, x: torch.Tensor) -> Moments:
    """By the definition."""
    gram = dct_matrix(Q) @ x @ x.T @ dct_matrix(Q).T
    right = torch.eye(Q, dtype=torch.float64) if features.right is None else features.right
    cols = features.cols
    return Moments(cols, gram[cols][:, cols], gram[cols] @ right.T, right @ gram @ right.T, x.shape[1])


def spread(selection: Selection, values: torch.Tensor) -> torch.Tensor:
    dense_core = torch.zeros(P * Q, dtype=torch.float64)
    dense_core[selection.places] = values
    return dense_core.view(P, Q)


def activation_error(delta: torch.Tensor, selection: Selection, values: torch.Tensor, x: torch.Tensor) -> float:
    return float(((delta - delta_of(spread(selection, values))) @ x).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("n", [1, 90, P * Q])
def test_never_worse_and_counted_exactly(kind: str, correlated: bool, n: int) -> None:
    delta, spectrum, selection = made(kind, n)
    x = inputs(correlated)
    fitted = refit(selection, spectrum, moments_of(features_of(selection, spectrum), x), 1e-3, torch.float64)
    energy = float((delta @ x).square().sum())
    assert fitted.energy == pytest.approx(energy, rel=1e-9)
    assert fitted.plain == pytest.approx(activation_error(delta, selection, selection.values, x), abs=1e-9 * energy)
    assert fitted.fitted == pytest.approx(activation_error(delta, selection, fitted.values, x), abs=1e-9 * energy)
    assert fitted.fitted <= fitted.plain


@pytest.mark.parametrize("kind", KINDS)
def test_beats_plain_values_where_inputs_are_correlated(kind: str) -> None:
    _, spectrum, selection = made(kind)
    moments = moments_of(features_of(selection, spectrum), inputs(correlated=True))
    fitted = refit(selection, spectrum, moments, 1e-6, torch.float64)
    assert fitted.fitted < 0.5 * fitted.plain


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_least_squares_solution_of_the_dense_problem(kind: str) -> None:
    """min ||(delta_W - C_p^T S C_q) X||^2 + lambda ||s - s_plain||^2 over all values at once."""
    delta, spectrum, selection = made(kind)
    x, ridge = inputs(correlated=True), 1e-3
    moments = moments_of(features_of(selection, spectrum), x)
    fitted = refit(selection, spectrum, moments, ridge, torch.float64)
    effects = [
        delta_of(spread(selection, unit)) @ x for unit in torch.eye(selection.values.numel(), dtype=torch.float64)
    ]
    design = torch.stack([effect.flatten() for effect in effects], dim=1)
    damping = (ridge * moments.uu.diagonal().mean()).sqrt()
    design = torch.cat((design, damping * torch.eye(design.shape[1], dtype=torch.float64)))
    target = torch.cat(((delta @ x).flatten(), damping * selection.values))
    expected = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    torch.testing.assert_close(fitted.values, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 30.0])
def test_rounding_never_makes_a_row_worse(dtype: torch.dtype, ridge: float) -> None:
    """The least squares of a row, rounded, may be worse than its plain values, rounded; coarse numbers show it."""
    delta, spectrum, selection = made("low rank", 850)
    x = inputs(correlated=False)
    fitted = refit(selection, spectrum, moments_of(features_of(selection, spectrum), x), ridge, dtype)
    plain = selection.values.to(dtype).double()
    assert torch.equal(fitted.values, fitted.values.to(dtype).double())

    def rows(values: torch.Tensor) -> torch.Tensor:
        left = spectrum_rows(spectrum) - spread(selection, values)
        return (left @ dct_matrix(Q) @ x).square().sum(dim=1)

    assert bool((rows(fitted.values) <= rows(plain) * (1 + 1e-9)).all())
    assert fitted.fitted == pytest.approx(activation_error(delta, selection, fitted.values, x), rel=1e-6)


def spectrum_rows(spectrum: Spectrum) -> torch.Tensor:
    left = spectrum.left(slice(0, P))
    return left if spectrum.right is None else left @ spectrum.right


def test_inputs_of_zero_leave_the_values_alone() -> None:
    _, spectrum, selection = made("low rank")
    moments = moments_of(features_of(selection, spectrum), torch.zeros(Q, 5, dtype=torch.float64))
    fitted = refit(selection, spectrum, moments, 1e-3, torch.float64)
    assert torch.equal(fitted.values, selection.values)
    assert (fitted.energy, fitted.plain, fitted.fitted) == (0, 0, 0)


class Two(nn.Module):
    """Of transformers' models it has the call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, Q)
        self.first, self.second = nn.Linear(Q, P, dtype=torch.float64), nn.Linear(Q, 5, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = self.embed(input_ids).double()
        y: torch.Tensor = self.first(x).sum() + self.second(x[:, ::2]).sum()
        return y


def test_moments_are_those_of_what_the_layers_saw() -> None:
    torch.manual_seed(0)
    model = Two()
    _, thin, selection = made("low rank")
    features = {
        "first": features_of(selection, thin),
        "second": features_of(selection, DenseSpectrum(torch.zeros(5, Q))),
    }
    prompts = [torch.tensor([[1, 2, 3, 1]]), torch.tensor([[10]]), torch.tensor([[4, 5]])]
    found = measure(model, prompts, features)
    for name, step in (("first", 1), ("second", 2)):
        x = torch.cat([model.embed(ids)[0, ::step] for ids in prompts]).double().T.detach()
        expected = moments_of(features[name], x)
        assert found[name].tokens == expected.tokens
        for one, other in ((found[name].uu, expected.uu), (found[name].ur, expected.ur), (found[name].rr, expected.rr)):
            torch.testing.assert_close(one, other)
    assert not model.first._forward_pre_hooks


def test_parts_fit_the_memory() -> None:
    one = Features(torch.arange(6), torch.zeros(4, Q), Q)  # 10 features: 800 bytes
    all_ = {str(i): one for i in range(5)} | {"dense": replace(one, right=None)}  # 40 features: 12800 bytes
    parts = [list(part) for part in in_parts(all_, 2000)]
    assert parts == [["0", "1"], ["2", "3"], ["4"], ["dense"]]
