"""Which coefficients are kept: against sorting everything, with ties, over modules, in bands, and by error."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.errors import InvalidRequest
from overtone.tuning.compress.choosing import (
    Selection,
    choose_banded,
    choose_each,
    choose_over_all,
    fewest_for_error,
    wanted_for_error,
)
from overtone.tuning.compress.histogram import Histogram, Tally, energy_left, enough, merged
from overtone.tuning.compress.picking import Picked, Picker
from overtone.tuning.compress.spectra import DenseSpectrum
from support.compressing import FakeSource


def quiet(stage: str, module: str) -> None:
    pass


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64, some of them equal, some zero."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).round() / 3
    fine = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(*shape, generator=generator) < 0.5, coarse, fine)


def sorted_places(values: torch.Tensor) -> list[int]:
    """By magnitude, of equal ones the first; zeros left out."""
    order = sorted(range(values.numel()), key=lambda i: (-abs(float(values[i])), i))
    return [i for i in order if values[i] != 0]


def picked_from(values: torch.Tensor, wanted: int, step: int, sizes: list[int]) -> Picked:
    """Offered in pieces of `step`, never across two groups."""
    picker, start = Picker(wanted, sizes), 0
    for size in sizes:
        for part in torch.split(values[start : start + size], step):
            picker.offer(part, start)
            start += part.numel()
    return picker.done()


@pytest.mark.parametrize("wanted", [0, 1, 2, 7, 50, 250, 400])
@pytest.mark.parametrize("step", [1, 7, 300])
def test_the_largest_in_order(wanted: int, step: int) -> None:
    values = numbers(300)
    picked = picked_from(values, wanted, step, [100, 150, 50])
    expected = sorted_places(values)[:wanted]
    assert picked.places.tolist() == expected
    assert torch.equal(picked.values, values[expected])
    left = values.clone()
    left[expected] = 0
    torch.testing.assert_close(
        picked.dropped, torch.stack([part.square().sum() for part in left.split([100, 150, 50])])
    )


def test_all_equal_takes_the_first() -> None:
    picked = picked_from(torch.full((90,), -2.0, dtype=torch.float64), 40, 13, [90])
    assert picked.places.tolist() == list(range(40))
    assert picked.dropped.tolist() == [200.0]


@pytest.mark.parametrize("n", [0, 1, 19, 60])
def test_first_of_the_picked_is_as_if_fewer_were_wanted(n: int) -> None:
    values = numbers(300, seed=3)
    fewer, direct = picked_from(values, 60, 20, [120, 180]).first(n), picked_from(values, n, 20, [120, 180])
    assert torch.equal(fewer.places, direct.places)
    torch.testing.assert_close(fewer.dropped, direct.dropped)
    for group in range(2):
        assert torch.equal(fewer.of(group)[1], direct.of(group)[1])
        assert torch.equal(fewer.of(group)[1], fewer.of(group)[1].sort().values)


def check(selection: Selection, spectrum: torch.Tensor, expected: list[int]) -> None:
    assert selection.places.tolist() == sorted(expected)
    assert torch.equal(selection.values, spectrum.flatten()[selection.places])
    assert torch.equal(selection.rows * spectrum.shape[1] + selection.cols, selection.places)
    rest = spectrum.clone().flatten()
    rest[selection.places] = 0
    assert selection.dropped == pytest.approx(float(rest.square().sum()), rel=1e-12)
    assert selection.energy == pytest.approx(float(spectrum.square().sum()), rel=1e-12)


@pytest.fixture
def spectra(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Read in small blocks."""
    monkeypatch.setattr("overtone.tuning.compress.spectra.BLOCK", 64)
    return {"a": numbers(24, 40), "b": numbers(40, 24, seed=1) * 5, "c": numbers(7, 3, seed=2)}


def source_of(spectra: dict[str, torch.Tensor]) -> FakeSource:
    return FakeSource({name: DenseSpectrum(matrix) for name, matrix in spectra.items()})


@pytest.mark.parametrize("n", [1, 17, 100_000])
def test_each_module_has_its_largest(spectra: dict[str, torch.Tensor], n: int) -> None:
    for name, selection in choose_each(source_of(spectra), n, quiet).items():
        check(selection, spectra[name], sorted_places(spectra[name].flatten())[:n])


def test_each_band_has_its_largest(spectra: dict[str, torch.Tensor]) -> None:
    for name, selection in choose_banded(source_of(spectra), 20, quiet).items():
        p, q = spectra[name].shape
        far = math.hypot(p - 1, q - 1)
        band = {i: min(2, int(3 * math.hypot(i // q, i % q) / far - 1e-9)) for i in range(p * q)}
        ordered = sorted_places(spectra[name].flatten())
        expected = [i for b, share in enumerate((7, 7, 6)) for i in [i for i in ordered if band[i] == b][:share]]
        check(selection, spectra[name], expected)


@pytest.mark.parametrize("n", [1, 30, 300])
def test_over_all_the_largest_wherever_they_are(spectra: dict[str, torch.Tensor], n: int) -> None:
    chosen = choose_over_all(source_of(spectra), lambda h: n, lambda picked: picked.values.numel(), quiet)
    together = torch.cat([matrix.flatten() for matrix in spectra.values()])
    wanted, start = sorted_places(together)[:n], 0
    for name, matrix in spectra.items():
        check(chosen[name], matrix, [i - start for i in wanted if start <= i < start + matrix.numel()])
        start += matrix.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [0.9, 0.3, 0.05, 0.01])
def test_error_is_met_with_the_fewest(spectra: dict[str, torch.Tensor], error: float, dtype: torch.dtype) -> None:
    found = choose_over_all(
        source_of(spectra),
        lambda h: wanted_for_error(h, error, dtype),
        lambda picked: fewest_for_error(picked, error, dtype),
        quiet,
    )
    together = torch.cat([matrix.flatten() for matrix in spectra.values()])
    order = sorted_places(together)

    def error_with(n: int) -> float:
        kept = torch.zeros_like(together)
        kept[order[:n]] = together[order[:n]].to(dtype).double()
        return float((together - kept).norm() / together.norm())

    n = sum(one.values.numel() for one in found.values())
    assert error_with(n) <= error
    assert error_with(n - 1) > error


def test_error_below_rounding_is_refused(spectra: dict[str, torch.Tensor]) -> None:
    histograms = {name: histogram(matrix.flatten()) for name, matrix in spectra.items()}
    with pytest.raises(InvalidRequest, match="rounding to bfloat16") as caught:
        wanted_for_error(histograms, 0.003, torch.bfloat16)
    assert caught.value.field == "error"


def test_error_that_underflow_makes_unreachable_is_refused() -> None:
    tiny = torch.full((6, 5), 1e-9, dtype=torch.float64)
    with pytest.raises(InvalidRequest, match="float16") as caught:
        choose_over_all(
            source_of({"a": tiny}),
            lambda h: wanted_for_error(h, 0.5, torch.float16),
            lambda picked: fewest_for_error(picked, 0.5, torch.float16),
            quiet,
        )
    assert caught.value.field == "error"


def histogram(values: torch.Tensor) -> Histogram:
    tally = Tally()
    for part in torch.split(values, 100):
        tally.add(part)
    return tally.done()


def test_histograms_bound_what_sorting_finds() -> None:
    values = torch.cat([numbers(2000), torch.randn(500, dtype=torch.float64) * 1e-3, torch.tensor([0.0, 1e-300])])
    squares = values.square().sort(descending=True).values
    whole = histogram(values)
    assert whole.count == int((values.abs() > 1e-40).sum())
    assert whole.total == pytest.approx(float(squares.sum()), rel=1e-12)
    for n in (0, 1, 10, 500, 2000, 10**6):
        assert energy_left(whole, n) == pytest.approx(float(squares[n:].sum()), rel=0.01, abs=1e-12)
    for allowed in (0.0, 1e-3, 1.0, 300.0):
        fewest = next(n for n in range(len(squares) + 1) if squares[n:].sum() <= allowed + 1e-80)
        most = int((squares >= squares[max(0, fewest - 1)] * 0.99).sum())
        assert fewest <= enough(whole, allowed) <= most
    parts = merged([histogram(part) for part in values.split(700)])
    assert (parts.first, parts.counts.tolist()) == (whole.first, whole.counts.tolist())
    assert histogram(torch.zeros(5, dtype=torch.float64)).count == 0
