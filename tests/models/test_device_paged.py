"""Which attention prompts take on a GPU: torch's own for those without a past where it will do, else ours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from overtone.kernels.gpu.varlen import VarlenAttention
from overtone.models.attend import Softmax, attend
from overtone.models.device import paged as module
from overtone.models.device.paged import DevicePaged, chunks_of
from overtone.models.paged import Span

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 8


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch's, sequence by sequence."""
    assert window_size == (-1, 0)
    ends = cu_seq_q.tolist()
    assert max_q == max(end - start for start, end in pairwise(ends))
    parts = [
        attend(*(one[start:end].transpose(0, 1)[None] for one in (query, key, value)), None, Softmax(scale))[0]
        for start, end in pairwise(ends)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.mark.parametrize(
    ("spans", "window", "softmax", "by_torch"),
    [
        ([Span(0, 5, 0, [1]), Span(5, 9, 0, [2, 3])], None, Softmax(0.3), True),
        ([Span(0, 5, 0, [1]), Span(5, 9, 4, [2, 3])], None, Softmax(0.3), False),
        ([Span(0, 5, 0, [1])], 4, Softmax(0.3), False),
        ([Span(0, 5, 0, [1])], None, Softmax(0.3, cap=5.0), False),
    ],
    ids=["fresh", "past", "window", "cap"],
)
def test_fresh_prompts(
    spans: list[Span], window: int | None, softmax: Softmax, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[Any] = []
    monkeypatch.setattr(module, "attend_prefill", lambda *args: ours.append(args))
    found = VarlenAttention.of(varlen_attn)
    assert found is not None
    tokens = spans[-1].start + spans[-1].tokens
    numbers = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM, dtype=torch.float16)
    cache = torch.zeros(4, 1, PAGE, 2, KV_HEADS, DIM, dtype=torch.float16)
    slots = torch.zeros(tokens, dtype=torch.int64)
    chunks = chunks_of(spans, torch.device("cpu"))
    paged = DevicePaged(cache, slots, (window,), 90, chunks=chunks, varlen=found)
    query, new = numbers[:, :HEADS], numbers[:, HEADS:].view(tokens, 2, KV_HEADS, DIM)
    out = paged.attend(0, query, new, softmax)
    assert bool(ours) is not by_torch
    for span in spans if by_torch else ():
        at = slice(span.start, span.start + span.tokens)
        q, k, v = (one[at].transpose(0, 1)[None].double() for one in (query, new[:, 0], new[:, 1]))
        expected = attend(q, k, v, None, softmax)[0].transpose(0, 1)
        torch.testing.assert_close(out[at].double(), expected, rtol=0, atol=5e-3)
