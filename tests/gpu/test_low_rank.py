"""The Triton kernels of low-rank pairs against dense matrices in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels.gpu.batch import Layers, Rows
from overtone.kernels.gpu.low_rank import LowRankConfig, add_low_rank, pairs_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q, WIDTHS = 96, (40, 136, 16)
RANKS = ({0: 8, 1: 16, 2: 1}, {1: 33}, {0: 0, 2: 5}, {})


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [-1, -1], [2, -1, 0, 2, 1, 1], [1] * 4, []], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pairs(dtype: torch.dtype, owners: list[int]) -> None:
    """Three layers of different widths in one go, of different ranks or without a pair; all else stays, to the last
    bit."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    adapters = [{slot: (numbers(r, Q), numbers(r, WIDTHS[slot])) for slot, r in one.items()} for one in RANKS]
    columns = [0, WIDTHS[0], sum(WIDTHS[:2]) + 8]
    rows = torch.randperm(len(owners) + 2, generator=generator)[: len(owners)]
    x, y = numbers(len(owners) + 2, Q + 3)[:, :Q], numbers(len(owners) + 2, columns[2] + WIDTHS[2])
    batch = Rows(rows.to(DEVICE), torch.tensor(owners, dtype=torch.int32, device=DEVICE))
    layers = Layers.of([0, 1, 2], columns, list(WIDTHS), DEVICE)
    pool, found = pairs_of(adapters, 3, dtype, DEVICE), y.to(DEVICE).clone()
    add_low_rank(x.to(DEVICE), batch, pool, layers, found, LowRankConfig(block_q=32, block_p=32))
    expected = y.double()
    for row, owner in zip(rows.tolist(), owners, strict=True):
        for slot, (down, up) in (adapters[owner] if owner >= 0 else {}).items():
            delta = up.double().T @ (down.double() @ x[row].double())
            expected[row, columns[slot] : columns[slot] + WIDTHS[slot]] += delta
    tolerance = 1e-4 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance * 8)
    untouched = expected == y.double()
    assert torch.equal(found.cpu()[untouched], y[untouched])
