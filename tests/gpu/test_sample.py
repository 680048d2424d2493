"""The greedy choice on the device against that of the sampler, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from overtone.engine.sampler import row_maxima
from overtone.kernels.gpu.sample import GreedyConfig, GreedyRoom, choose_greedy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = GreedyConfig(block=64, warps=1)


def chosen(logits: torch.Tensor, kind: torch.dtype = torch.bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits.shape
    tokens = torch.full((rows,), -5, device=DEVICE)
    finite = torch.zeros(rows, dtype=kind, device=DEVICE)
    room = GreedyRoom.of(rows + 1, vocabulary, CONFIG, DEVICE)
    choose_greedy(logits.to(DEVICE), tokens, finite, room, CONFIG)
    return tokens.cpu(), finite.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 64, 300])
def test_choice(dtype: torch.dtype, vocabulary: int) -> None:
    """Of equal ones the first, in a part, in the next, and where all are equal; rows of a wider tensor."""
    logits = torch.randn(6, vocabulary + 3, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :vocabulary]
    logits[1] = 0
    logits[2, [-1, -1 - vocabulary // 2, -1 - vocabulary // 3]] = 10
    logits[3] = -1e4
    logits[4] = -torch.inf
    logits[4, vocabulary // 2] = -3
    tokens, finite = chosen(logits)
    assert torch.equal(tokens, row_maxima(logits)[1])
    assert finite.all()


def test_not_finite() -> None:
    logits = torch.zeros(5, 200)
    logits[0, 130] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = -torch.inf
    logits[4, 5], logits[4, 190] = torch.inf, torch.nan
    tokens, finite = chosen(logits, torch.int8)
    assert torch.equal(finite.bool(), row_maxima(logits)[0].isfinite())
    assert tokens.tolist() == [130, 7, 0, 0, 5]
    assert finite.tolist() == [0, 0, 0, 1, 0]
