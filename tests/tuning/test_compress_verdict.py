"""What random deltas keep: against drawing some."""

from __future__ import annotations

import pytest
import torch

from overtone.tuning.compress.verdict import random_share, skill, verdict

CELLS = 400_000


@pytest.mark.parametrize("n", [1, 40, 4000, 100_000, 300_000, 399_999, CELLS])
def test_share_of_a_random_delta(n: int) -> None:
    values = torch.randn(CELLS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    kept = float(values.topk(n).values.sum() / values.sum())
    assert random_share(n, CELLS) == pytest.approx(kept, rel=0.2 if n < 10 else 0.01)


def test_ends() -> None:
    assert random_share(0, 10) == 0
    assert random_share(10, 10) == 1
    assert random_share(20, 10) == 1
    assert skill(0.3, 0.3) == 0
    assert skill(1.0, 0.3) == 1
    assert skill(1.0, 1.0) == 1


def test_words_for_it() -> None:
    assert verdict(0.1, 0.1) == "does not compress"
    assert verdict(0.32, 0.1) == "does not compress"
    assert verdict(0.33, 0.1) == "compresses partly"
    assert verdict(0.77, 0.1) == "compresses partly"
    assert verdict(0.78, 0.1) == "compresses"
