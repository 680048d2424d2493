"""Deltas in the DCT plane: against dense float64 transforms by their definition, and without a dense tensor on the way."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.kernels import sparse_core
from overtone.kernels.reference import dct_matrix
from overtone.tuning.compress.bands import band_masks, shares
from overtone.tuning.compress.choosing import choose_each
from overtone.tuning.compress.cosine import dct
from overtone.tuning.compress.spectra import BLOCK, SparseSpectrum, Spectrum, blocks, dense, low_rank
from support.compressing import FakeSource, largest_tensor, random_pair, spectrum_of
from support.tolerances import assert_close

SIZES = [1, 2, 3, 4, 5, 8, 17, 64, 96, 255, 256, 257]
SHAPES = [(24, 40), (40, 24), (7, 3), (1, 9), (9, 1), (33, 33)]


def whole(spectrum: Spectrum) -> torch.Tensor:
    return torch.cat([block for _, block in blocks(spectrum)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dct_is_the_matrix(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    assert_close(dct(x), x.double() @ dct_matrix(size).T)
    assert dct(x).dtype == dtype
    assert dct(x[:0]).shape == (0, 2, size)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_stay_factors(shape: tuple[int, int]) -> None:
    b, a = (t.double() for t in random_pair(shape, 3))
    spectrum = low_rank(b, a)
    assert spectrum.factor.shape == (shape[0], 3)
    assert spectrum.right.shape == (3, shape[1])
    assert_close(whole(spectrum), spectrum_of(b @ a))


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_is_transformed_in_its_own_memory(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, memory = spectrum_of(delta), delta.data_ptr()
    spectrum = dense(delta)
    assert spectrum.matrix.data_ptr() == memory
    assert_close(whole(spectrum), expected)


def test_blocks_are_the_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtone.tuning.compress.spectra.BLOCK", 100)
    delta = torch.randn(17, 40, dtype=torch.float64)
    expected = spectrum_of(delta)
    found = list(blocks(dense(delta)))
    assert [start for start, _ in found] == [80 * i for i in range(9)]
    assert_close(torch.cat([block for _, block in found]), expected)


def test_sparse_core_is_its_own_spectrum() -> None:
    rows, cols = torch.tensor([4, 0, 4, 2]), torch.tensor([1, 5, 0, 2])
    core = sparse_core(rows, cols, torch.tensor([1.0, 2.0, 3.0, 4.0]), (5, 6))
    spectrum = SparseSpectrum(core)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    expected[rows, cols] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert torch.equal(whole(spectrum), expected)
    some = torch.tensor([4, 2, 4, 1])
    assert torch.equal(spectrum.left(some), expected[some])


def test_low_rank_never_makes_the_dense_delta() -> None:
    p, q = 1500, 1200
    assert p * q > BLOCK
    b, a = random_pair((p, q), 2)
    with largest_tensor() as largest:
        source = FakeSource({"layer": low_rank(b.double(), a.double())})
        choose_each(source, 500, lambda stage, module: None)
    assert math.prod(largest[0]) <= BLOCK


@pytest.mark.parametrize("shape", SHAPES)
def test_bands_are_thirds_of_the_distance(shape: tuple[int, int]) -> None:
    masks = band_masks(0, shape[0], shape)
    farthest = math.hypot(shape[0] - 1, shape[1] - 1)
    for u in range(shape[0]):
        for v in range(shape[1]):
            band = [bool(mask[u, v]) for mask in masks]
            distance = 3 * math.hypot(u, v)
            expected = 0 if distance <= farthest * (1 + 1e-12) else 1 if distance <= 2 * farthest * (1 + 1e-12) else 2
            assert band == [i == expected for i in range(3)], (u, v)


def test_shares_add_up() -> None:
    assert [shares(n) for n in (1, 2, 3, 1000)] == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (334, 333, 333)]
