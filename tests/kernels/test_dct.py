"""The DCT frame against its definition: every kind of size, both forms, any batch dimensions."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.kernels import DctFrame, reference
from overtone.kernels.dct import DENSE_MAX_SIZE
from support.tolerances import assert_close

SIZES = (1, 2, 3, 5, 8, 9, 15, 16, 192, 255, 256, 257, 576, 577, 1536)

forms = pytest.mark.parametrize("dense", [True, False], ids=["dense", "fft"])
sizes = pytest.mark.parametrize("size", SIZES)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def from_definition(x: list[float]) -> list[float]:
    """X_k = s_k sum_j x_j cos(pi (2 j + 1) k / (2 N)), term by term."""
    n = len(x)
    scales = [math.sqrt(1 / n)] + [math.sqrt(2 / n)] * (n - 1)
    return [
        scale * math.fsum(value * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for j, value in enumerate(x))
        for k, scale in enumerate(scales)
    ]


@forms
@sizes
def test_analyse_is_the_reference(size: int, dense: bool) -> None:
    x = random_rows(3, size)
    assert_close(DctFrame(size, dense=dense).analyse(x), reference.dct_analyse(x.double()))


@forms
@sizes
def test_synthesise_is_the_reference(size: int, dense: bool) -> None:
    u = random_rows(3, size)
    assert_close(DctFrame(size, dense=dense).synthesise(u), reference.dct_synthesise(u.double()))


@forms
@pytest.mark.parametrize("size", [n for n in SIZES if n < 300])
def test_analyse_is_the_definition(size: int, dense: bool) -> None:
    x = random_rows(size, seed=1)
    assert_close(DctFrame(size, dense=dense).analyse(x), torch.tensor(from_definition(x.tolist()), dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3, 9, 16])
def test_reference_matrix_is_the_definition(size: int) -> None:
    columns = [from_definition([1.0 if i == j else 0.0 for i in range(size)]) for j in range(size)]
    assert_close(reference.dct_matrix(size), torch.tensor(columns, dtype=torch.float64).T)


@forms
@sizes
def test_orthonormal(size: int, dense: bool) -> None:
    frame, x = DctFrame(size, dense=dense), random_rows(4, size, seed=2)
    z = frame.analyse(x)
    assert_close(frame.synthesise(z), x)
    assert_close(frame.analyse(frame.synthesise(x)), x)
    # Parseval: no energy is lost, for each row.
    assert_close(z.square().sum(-1), x.double().square().sum(-1), scale=size)
    # The two directions are adjoint: <C x, u> = <x, C^T u>.
    u = random_rows(4, size, seed=3)
    assert_close((z * u).sum(-1), (x.double() * frame.synthesise(u).double()).sum(-1), scale=math.sqrt(size))


@forms
@pytest.mark.parametrize("size", [5, 16, 257])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 1, 4)])
def test_batch_dimensions(size: int, dense: bool, batch: tuple[int, ...]) -> None:
    frame, x = DctFrame(size, dense=dense), random_rows(*batch, size, seed=4)
    for transform in (frame.analyse, frame.synthesise):
        whole = transform(x)
        assert whole.shape == x.shape
        assert whole.dtype == torch.float32
        rows = [transform(row) for row in x.reshape(-1, size)]
        assert_close(whole.reshape(-1, size), torch.stack(rows) if rows else whole.reshape(-1, size))


@forms
@pytest.mark.parametrize("size", [3, 192, 577])
def test_non_contiguous_rows(size: int, dense: bool) -> None:
    frame, x = DctFrame(size, dense=dense), random_rows(size, 4, seed=5).T
    assert not x.is_contiguous()
    assert_close(frame.analyse(x), reference.dct_analyse(x.double()))
    assert_close(frame.synthesise(x), reference.dct_synthesise(x.double()))


@forms
@pytest.mark.parametrize("size", [3, 192, 577])
def test_linear(size: int, dense: bool) -> None:
    frame = DctFrame(size, dense=dense)
    x, y = random_rows(2, size, seed=6), random_rows(2, size, seed=7)
    for transform in (frame.analyse, frame.synthesise):
        assert_close(transform(2.5 * x - 3 * y), 2.5 * transform(x).double() - 3 * transform(y).double(), scale=5)
        assert not transform(torch.zeros(2, size)).any()


def test_form_is_chosen_by_size() -> None:
    assert DctFrame(DENSE_MAX_SIZE).dense
    assert not DctFrame(DENSE_MAX_SIZE + 1).dense


def test_constant_has_one_frequency() -> None:
    z = DctFrame(577).analyse(torch.full((577,), 2.0))
    assert_close(z, torch.tensor([2 * math.sqrt(577)] + [0.0] * 576), scale=50)
