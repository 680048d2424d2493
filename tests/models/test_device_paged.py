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


def test_pages_that_torch_takes() -> None:
    """Chunks with a past, from the cache itself, where the pages are as large as torch's attention wants them."""
    given: dict[str, Any] = {}

    def paging(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, scale: float, window_size: Any, enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        given.update(key=key, value=value, ends=cu_seq_q, most=(max_q, max_k), keys=seqused_k, table=block_table)
        return query

    found = VarlenAttention.of(paging)
    assert found is not None
    cache = torch.randn(4, 2, 256, 2, KV_HEADS, DIM).half()
    spans = [Span(1, 5, 300, [1, 2]), Span(6, 3, 0, [3])]
    chunks = chunks_of(spans, torch.device("cpu"))
    paged = DevicePaged(cache, torch.zeros(9, dtype=torch.int64), (None, None), 90, chunks=chunks, varlen=found)
    query, new = torch.randn(9, HEADS, DIM).half(), torch.zeros(9, 2, KV_HEADS, DIM).half()
    assert torch.equal(paged.attend(1, query, new, Softmax(0.3))[1:], query[1:])
    assert torch.equal(given["key"], cache[:, 1, :, 0])
    assert torch.equal(given["value"], cache[:, 1, :, 1])
    assert (given["ends"].tolist(), given["keys"].tolist()) == ([0, 5, 8], [305, 3])
    assert (given["table"].tolist(), given["most"]) == ([[1, 2], [3, 0]], (5, 305))
