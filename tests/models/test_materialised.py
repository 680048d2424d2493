"""When prompts are computed with a dense delta, and what is kept of it. That it gives the same: test_mixed_terms.py."""

from __future__ import annotations

import pytest
import torch

from overtone.kernels import DCT, IDENTITY, FrameBank, SharedMatrix, compress, projection
from overtone.models.adapter_rows import AdapterRows, Output
from overtone.models.adapter_step import AdapterStep
from overtone.models.channels import PreparedTerm
from overtone.models.lanes import Segment
from overtone.models.materialised import BY_NATIVE_KERNELS, BY_TORCH, Materialised, TokenCost, pays
from support.cores import random_core
from support.deltas import Prepared
from support.deltas import PreparedTerm as Term

SHAPE, LARGE = (96, 64), (384, 512)


def term(nnz: int, frame: object = IDENTITY, shape: tuple[int, int] = SHAPE) -> PreparedTerm:
    core = compress(random_core(shape, nnz, torch.Generator().manual_seed(nnz)))
    return Term(frame, core, IDENTITY)  # type: ignore[arg-type]


def test_large_cores_and_long_prompts_pay() -> None:
    """A token costs 25,500 entries 194,000 multiply-adds, 60,000 entries 456,000, a dense product 197,000."""
    cost = TokenCost(entry=7.6, step=6.0)
    assert not pays(term(1000, shape=LARGE), LARGE, 1 << 20, cost)
    assert not pays(term(60_000, shape=LARGE), LARGE, 800, cost)
    assert pays(term(60_000, shape=LARGE), LARGE, 1200, cost)
    assert not pays(term(25_500, shape=LARGE), LARGE, 1 << 20, cost)
    assert pays(term(25_500, DCT, LARGE), LARGE, 1 << 20, cost)
    shared = projection(SharedMatrix("k", torch.randn(512, 512)))
    assert not pays(term(60_000, shared, LARGE), LARGE, 1 << 20, cost)


@pytest.mark.parametrize("cost", [BY_NATIVE_KERNELS, BY_TORCH])
def test_more_tokens_never_pay_less(cost: TokenCost) -> None:
    for nnz in (1, 1000, 30_000, 60_000):
        made = term(nnz, DCT, shape=LARGE)
        answers = [pays(made, LARGE, tokens, cost) for tokens in (0, 1, 100, 600, 1000, 3000, 10_000)]
        assert answers == sorted(answers)


def step(kept: AdapterRows, prompts: list[Segment]) -> torch.Tensor:
    passed = AdapterStep([], prompts, FrameBank(torch.device("cpu")), kept)
    tokens = sum(segment.tokens for segment in prompts)
    y = torch.zeros(1, tokens, SHAPE[0])
    passed.add(torch.ones(1, tokens, SHAPE[1]), Output("m", y))
    return y


def test_kept_while_the_prompt_goes_on_and_no_longer() -> None:
    kept, large, other = AdapterRows(torch.device("cpu")), Prepared((term(3000),)), Prepared((term(2000),))
    first = step(kept, [Segment(3, {"m": large}, ahead=1000)])
    assert kept.materialised.nbytes == 4 * SHAPE[0] * SHAPE[1]
    assert kept.paths == {"materialised": 3}
    # Its last few tokens would not pay by themselves, but the matrix is there.
    last = step(kept, [Segment(2, {"m": large}, ahead=0), Segment(1, {"m": other})])
    assert kept.paths == {"materialised": 5, "prompt": 1}
    torch.testing.assert_close(last[0, 0], first[0, 0])
    step(kept, [Segment(1, {"m": other})])
    step(kept, [Segment(1, {"m": other})])
    assert kept.materialised.nbytes == 0


def test_without_room_prompts_go_the_other_way() -> None:
    assert Materialised(budget=10).of(term(3000), SHAPE, 10_000, BY_TORCH, pytest.fail) is None
