"""The banded choice of places against the plane as a whole: exact numbers, no place twice, the largest where it says so."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from overtone.errors import InvalidRequest
from overtone.tuning.methods import LoraMethod, SdctftMethod, selection
from overtone.tuning.methods.selection import LowRank, Matrix, band_shares, banded_places
from overtone.tuning.methods.transforms import Transforms
from support.oracle import orthonormal_waves
from support.tiny import tiny_model
from support.tuned import TARGETS, perturb

SHAPES = [(24, 17), (9, 40), (33, 33), (1, 30), (30, 2)]


def _choose(matrix: Matrix, n: int, *, ratio: float = 0.7, limit: str = "full", seed: int = 0) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(seed)
    places = banded_places(
        matrix, n, energy_ratio=ratio, band_limit=limit, generator=generator, transforms=Transforms()
    )
    assert places.shape == (2, n)
    assert places.dtype == torch.int64
    return [(int(u), int(v)) for u, v in places.T.tolist()]


def _bands(shape: tuple[int, int], limit: str) -> list[list[tuple[int, int]]]:
    """By the distances themselves."""
    p, q = shape
    farthest = math.hypot(p - 1, q - 1) if limit == "full" else math.hypot(p / 2, q / 2)
    bands: list[list[tuple[int, int]]] = [[], [], []]
    for u, v in itertools.product(range(p), range(q)):
        d = math.hypot(u, v)
        # A hair's breadth, for distances that are exactly a third.
        bands[sum(d > part * farthest / 3 + 1e-9 for part in (1, 2))].append((u, v))
    return bands


def _matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _strengths(matrix: torch.Tensor) -> dict[tuple[int, int], float]:
    rows, cols = (orthonormal_waves(np.arange(size), size) for size in matrix.shape)
    plane = np.abs(rows @ matrix.double().numpy() @ cols.T)
    return {place: float(plane[place]) for place in itertools.product(*map(range, matrix.shape))}


@pytest.mark.parametrize("limit", ["full", "half"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_exactly_n_different_places_in_even_bands(shape: tuple[int, int], part: float, limit: str) -> None:
    n = max(1, round(part * shape[0] * shape[1]))
    chosen = _choose(_matrix(shape), n, limit=limit)
    assert len(set(chosen)) == n
    assert chosen == sorted(chosen)
    assert all(0 <= u < shape[0] and 0 <= v < shape[1] for u, v in chosen)
    bands = _bands(shape, limit)
    counts = [len(set(chosen) & set(band)) for band in bands]
    assert sum(counts) == n
    fair = [n // 3 + (band < n % 3) for band in range(3)]
    if all(len(band) >= share for band, share in zip(bands, fair, strict=True)):
        assert counts == fair
    else:  # a band that got less than its part is used up
        assert all(count >= min(share, len(band)) for count, share, band in zip(counts, fair, bands, strict=True))


@pytest.mark.parametrize("rows_together", [1, 5, 1000])
@pytest.mark.parametrize("limit", ["full", "half"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_most_are_the_largest_of_their_band(
    shape: tuple[int, int], limit: str, rows_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_TOGETHER", rows_together * shape[1])
    matrix, n = _matrix(shape), 61
    strengths, chosen = _strengths(matrix), set(_choose(matrix, n, limit=limit))
    for band, members in enumerate(_bands(shape, limit)):
        share = n // 3 + (band < n % 3)
        largest = sorted(members, key=lambda place: -strengths[place])
        assert set(largest[: round(0.7 * share)]) <= chosen
        assert len(chosen & set(members)) == share
        # The rest is not simply the next ones.
        assert chosen & set(members) != set(largest[:share])


def test_the_rest_is_random_of_the_seed_and_even() -> None:
    shape = (24, 17)
    matrix = _matrix(shape)
    assert _choose(matrix, 60, seed=3) == _choose(matrix, 60, seed=3)
    assert _choose(matrix, 60, seed=3) != _choose(matrix, 60, seed=4)
    assert _choose(matrix, 60, ratio=1.0, seed=3) == _choose(matrix, 60, ratio=1.0, seed=4)
    counts: dict[tuple[int, int], int] = {}
    for seed in range(400):
        for place in _choose(matrix, 60, ratio=0.0, seed=seed):
            counts[place] = counts.get(place, 0) + 1
    for members in _bands(shape, "full"):
        expected = 400 * 20 / len(members)
        assert all(abs(counts.get(place, 0) - expected) < 6 * math.sqrt(expected) for place in members)


def test_low_rank_is_as_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 40, generator=generator), torch.randn(25, 3, generator=generator)
    expected = _choose(-0.3 * b @ a, 70, ratio=1.0)
    monkeypatch.setattr(selection, "_TOGETHER", 7 * 40)
    assert _choose(LowRank(a, b, -0.3), 70, ratio=1.0) == expected


def test_shares_of_bands() -> None:
    assert band_shares([100, 100, 100], 10) == [4, 3, 3]
    assert band_shares([2, 100, 100], 30) == [2, 18, 10]
    assert band_shares([100, 0, 1], 30) == [29, 0, 1]
    assert band_shares([5, 6, 7], 18) == [5, 6, 7]
    assert band_shares([1, 1, 0], 1) == [1, 0, 0]


def test_places_are_of_the_base_weight_or_of_a_change() -> None:
    method = SdctftMethod(n=50, energy_ratio=1.0, targets=TARGETS)
    lora_model = tiny_model()
    lora = LoraMethod(r=2, targets=TARGETS).attach(lora_model, seed=0, total_steps=1)
    perturb(lora)
    changed = SdctftMethod(n=50, energy_ratio=1.0, targets=TARGETS, changes=lora.factors())
    for chosen, matrices in (
        (method, {name: tiny_model().get_submodule(name).weight for name in lora.deltas()}),
        (changed, lora.deltas()),
    ):
        state = chosen.attach(tiny_model(), seed=0, total_steps=1).state()
        for name, matrix in matrices.items():
            places = [(int(u), int(v)) for u, v in state[f"{name}.places"].T.tolist()]
            assert places == _choose(matrix.detach(), 50, ratio=1.0)


def test_changes_must_fit_the_layers() -> None:
    model = tiny_model()
    q, v = (f"model.layers.{layer}.self_attn.{{}}_proj" for layer in range(2)), (96, 64)
    full = {name.format("q"): torch.randn(v) for name in q}
    SdctftMethod(n=5, targets=["q_proj"], changes=full).attach(model, seed=0, total_steps=1).detach()
    first = next(iter(full))
    for broken, reason in (
        ({first: full[first]}, "has none of model.layers.1.self_attn.q_proj"),
        ({**full, first: full[first].T}, "has one of \\(64, 96\\) for"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as caught:
            SdctftMethod(n=5, targets=["q_proj"], changes=broken).attach(model, seed=0, total_steps=1)
        assert caught.value.field == "changes"
