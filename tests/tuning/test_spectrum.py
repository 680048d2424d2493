"""The spectral product and its gradients against dense definitions in float64, and by moving coefficients one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from overtone.adapters.families.coefficients import Coefficients
from overtone.adapters.families.loca import decode_locations
from overtone.tuning.methods import spectrum
from overtone.tuning.methods.spectrum import Plane, decode, spectral_product
from overtone.tuning.methods.transforms import Transforms
from support.oracle import orthonormal_waves
from support.tuned import Shapes

SHAPES = [(7, 11), (12, 5), (6, 6)]
ALPHA = 1.7
N = 14


def _dense(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """delta_W (p, q) by the definition, differentiable in the coefficients."""
    rows, cols = (torch.tensor(orthonormal_waves(k.numpy(), s)) for k, s in zip(places, shape, strict=True))
    return ALPHA * (rows * values[:, None]).T @ cols


class _Case:
    """Locations at both ends, beyond them, and twice in one place; x (2, 3, q)."""

    def __init__(self, shape: tuple[int, int], size: float = 0.3) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(shape[0])
        t = torch.rand(2, N, generator=generator, dtype=torch.float64)
        t[0, :6] = torch.tensor([0.0, 0.999, 0.9995, -0.2, 1.3, 0.5])
        t[1, :6] = torch.tensor([0.999, 0.0, 0.4, 0.6, 1.0, -0.01])
        t[:, 7] = t[:, 6]
        self.locations = t.requires_grad_()
        self.values = (torch.randn(N, generator=generator, dtype=torch.float64) * size).requires_grad_()
        self.x = torch.randn(2, 3, shape[1], generator=generator, dtype=torch.float64).requires_grad_()
        self.g = torch.randn(2, 3, shape[0], generator=generator, dtype=torch.float64)
        self.places = decode(self.locations, shape)
        self.plane = Plane(shape, ALPHA, Transforms())

    def product(self) -> torch.Tensor:
        return spectral_product(self.x, self.values, self.places, self.plane, self.locations)

    def expected_location_gradient(self, slope: Callable[[int, int], float]) -> torch.Tensor:
        """slope: (axis, i) -> what is clamped to [-1, 1]."""
        gradient = torch.zeros(2, N, dtype=torch.float64)
        for axis, size in enumerate(self.shape):
            for i in range(N):
                inside = 0 <= float(self.locations.detach()[axis, i]) <= 0.999
                gradient[axis, i] = float(np.clip(slope(axis, i), -1, 1)) * (size - 1) * inside
        return gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_with_the_dense_delta(shape: tuple[int, int]) -> None:
    case = _Case(shape)
    expected = case.x @ _dense(case.values, case.places, shape).T
    torch.testing.assert_close(case.product(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [0.05, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_location_gradient_of_a_linear_loss_is_what_moving_each_coefficient_does(
    shape: tuple[int, int], size: float
) -> None:
    """A loss that is linear in delta_W has the difference itself, not only its linearisation, as its slope."""
    case = _Case(shape, size)
    (case.product() * case.g).sum().backward()

    @torch.no_grad()
    def loss(places: torch.Tensor) -> float:
        return float(((case.x @ _dense(case.values, places, shape).T) * case.g).sum())

    def moved(axis: int, i: int, by: int) -> float:
        places = case.places.clone()
        places[axis, i] = min(max(int(places[axis, i]) + by, 0), shape[axis] - 1)
        return loss(places)

    slopes = {(axis, i): (moved(axis, i, 1) - moved(axis, i, -1)) / 2 for axis in range(2) for i in range(N)}
    expected = case.expected_location_gradient(lambda axis, i: slopes[axis, i])
    assert case.locations.grad is not None
    torch.testing.assert_close(case.locations.grad, expected, rtol=1e-10, atol=1e-10)
    clamped = sum(abs(slope) > 1 for slope in slopes.values())
    assert clamped > 0 if size > 1 else clamped == 0
    assert int((expected == 0).sum()) >= 6  # the ones that are out of range


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_nonlinear_loss_are_the_dense_formulae(shape: tuple[int, int]) -> None:
    case = _Case(shape)
    (torch.sin(case.product()) * case.g).sum().backward()
    (p, q), x = shape, case.x.detach()
    delta = _dense(case.values.detach(), case.places, shape).requires_grad_()
    (torch.sin(x @ delta.T) * case.g).sum().backward()
    assert delta.grad is not None
    waves = [torch.tensor(orthonormal_waves(np.arange(size), size)) for size in shape]
    k = ALPHA * waves[0] @ delta.grad @ waves[1].T
    rows, cols = case.places

    def slope(axis: int, i: int) -> float:
        r, c = int(rows[i]), int(cols[i])
        if axis == 0:
            difference = k[min(r + 1, p - 1), c] - k[max(r - 1, 0), c]
        else:
            difference = k[r, min(c + 1, q - 1)] - k[r, max(c - 1, 0)]
        return float(case.values.detach()[i] * difference / 2)

    assert case.locations.grad is not None
    assert case.values.grad is not None
    torch.testing.assert_close(case.values.grad, k[rows, cols], rtol=1e-10, atol=1e-10)
    expected = case.expected_location_gradient(slope)
    torch.testing.assert_close(case.locations.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_input_and_coefficient_gradients_are_finite_differences(shape: tuple[int, int]) -> None:
    case = _Case(shape)
    places, plane = case.places, case.plane
    assert torch.autograd.gradcheck(lambda x, a: spectral_product(x, a, places, plane), (case.x, case.values))


def test_groups_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _Case((7, 11))

    def all_of_it() -> list[torch.Tensor]:
        y = case.product()
        leaves = (case.x, case.values, case.locations)
        return [y, *torch.autograd.grad((torch.cos(y) * case.g).sum(), leaves)]

    whole = all_of_it()
    monkeypatch.setattr(spectrum, "_TOGETHER", 4 * N)
    for got, expected in zip(all_of_it(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_no_tokens_have_an_empty_product() -> None:
    case = _Case((7, 11))
    x = torch.zeros(0, 11, requires_grad=True)
    y = spectral_product(x, case.values.detach().float(), case.places, case.plane)
    assert y.shape == (0, 7)
    y.sum().backward()
    assert x.grad is not None


def test_nothing_as_large_as_the_weight_is_built() -> None:
    """Sizes above those whose transform is a dense product, so that all is smaller than p x q."""
    p, q = 300, 280
    generator = torch.Generator().manual_seed(0)
    locations = torch.rand(2, 20, generator=generator).requires_grad_()
    values = torch.randn(20, generator=generator).requires_grad_()
    x = torch.randn(5, q, generator=generator).requires_grad_()
    plane = Plane((p, q), 1.0, Transforms())
    spectral_product(x, values, decode(locations, (p, q)), plane, locations).sum().backward()  # the tables
    with Shapes() as shapes:
        spectral_product(x, values, decode(locations, (p, q)), plane, locations).sum().backward()
    assert max(int(np.prod(shape)) for shape in shapes.seen) <= 20 * max(p, q)
    assert {(p, 5), (q, 5), (20, 5)} <= shapes.seen  # what it sees is the work


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_locations_decode_as_the_server_decodes_them(dtype: torch.dtype) -> None:
    shape = (4096, 577)
    ends = torch.tensor([0.0, 0.999, 0.9995, 1.0])
    # Halves of a cell, where rounding decides, and a bit to either side.
    halves = ((torch.arange(40) + 0.5) / torch.tensor([[4095.0], [576.0]])).to(dtype)
    near = [torch.nextafter(halves, torch.full_like(halves, end)) for end in (0, 1)]
    t = torch.cat((torch.rand(2, 3000).to(dtype), ends.to(dtype).expand(2, 4), halves, *near), dim=1)
    stored = Coefficients("a", torch.zeros(t.shape[1]), "t", t)
    assert torch.equal(decode(t, shape), decode_locations(stored, shape))
