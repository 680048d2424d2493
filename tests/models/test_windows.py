"""Paged attention with windows, soft caps and sinks against its definition, one query and one key at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from overtone.models.attend import Softmax
from overtone.models.attention import attend_paged, paged_attention
from overtone.models.paged import PagedBatch, Span

KV_HEADS, GROUP, DIM = 2, 2, 4
PAGE = 4
HEADS = KV_HEADS * GROUP


def by_definition(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, window: int | None, rule: dict[str, Any]
) -> torch.Tensor:
    """query: (n, heads, D), of the tokens from position `first` on; keys, values: (L, kv_heads, D); float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i in range(len(query)):
        for head in range(HEADS):
            seen = [k for k in range(len(keys)) if k <= first + i and (window is None or first + i - k < window)]
            scores = [float(query[i, head] @ keys[k, head // GROUP]) * rule["scaling"] for k in seen]
            if rule["softcap"] is not None:
                scores = [rule["softcap"] * math.tanh(score / rule["softcap"]) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (math.exp(float(rule["s_aux"][head])) if rule["s_aux"] is not None else 0.0)
            for k, weight in zip(seen, weights, strict=True):
                out[i, head] += weight / total * values[k, head // GROUP]
    return out


@given(
    decodes=st.lists(st.integers(1, 9), max_size=3),
    chunks=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), max_size=2),
    window=st.none() | st.integers(1, 10),
    softcap=st.none() | st.sampled_from([0.5, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_its_definition(
    decodes: list[int],
    chunks: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    """decodes: lengths of sequences whose last token is new; chunks: (past, tokens)."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    parts = [(n - 1, 1) for n in decodes] + chunks
    if not parts:
        return
    lengths = [past + tokens for past, tokens in parts]
    counts = [-(-n // PAGE) for n in lengths]
    order = (torch.randperm(sum(counts), generator=rng) + 1).split(counts)  # page 0 pads
    keys, values = [random(n, KV_HEADS, DIM) for n in lengths], [random(n, KV_HEADS, DIM) for n in lengths]
    cache = torch.zeros(1, (sum(counts) + 1) * PAGE, 2, KV_HEADS, DIM, dtype=torch.float64)
    for pages, k, v, (past, _) in zip(order, keys, values, parts, strict=True):
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:past]
        cache[0, slots, 0], cache[0, slots, 1] = k[:past], v[:past]
    new = [slice(past, None) for past, _ in parts]
    query = [random(tokens, HEADS, DIM) for _, tokens in parts]
    spans, start = [], 0
    for pages, (past, tokens) in zip(order, parts, strict=True):
        spans.append(Span(start, tokens, past, pages.tolist()))
        start += tokens
    batch = PagedBatch(cache, PAGE, spans, (window,))
    rule: dict[str, Any] = {"scaling": 0.7, "softcap": softcap, "s_aux": random(HEADS) if sinks else None}
    out, _ = paged_attention(
        SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
        _packed(query), _packed([k[n] for k, n in zip(keys, new, strict=True)]),
        _packed([v[n] for v, n in zip(values, new, strict=True)]), None, paged=batch, **rule,
    )  # fmt: skip
    expected = [by_definition(query[i], keys[i], values[i], past, window, rule) for i, (past, _) in enumerate(parts)]
    # The plain path has its softmax in float32.
    torch.testing.assert_close(out[0], torch.cat(expected), rtol=0, atol=1e-5)


def _packed(parts: list[torch.Tensor]) -> torch.Tensor:
    """(1, heads, T, D)"""
    return torch.cat(parts).transpose(0, 1)[None]


def test_no_more_is_read_than_the_window_holds() -> None:
    cache = torch.zeros(2, 24, 2, 1, 1)
    spans = [Span(0, 1, 19, [5, 4, 3, 2, 1]), Span(1, 3, 17, [1, 2, 3, 4, 5])]
    batch = PagedBatch(cache, PAGE, spans, (None, 4))
    everything, near = batch.groups(0), batch.groups(1)
    assert [group.pages.shape for group in everything] == [(1, 5), (1, 5)]
    assert [group.pages.tolist() for group in near] == [[[1]], [[4, 5]]]
    seen = near[1].mask
    assert seen is not None
    # Queries 17, 18 and 19 over keys 12 to 19.
    assert seen[0, 0].isfinite().int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_a_broken_neighbour_is_not_seen() -> None:
    """NaN in one sequence's keys and values: the others of its group, padded to its length, do not notice."""
    cache = torch.zeros(1, 5 * PAGE, 2, KV_HEADS, DIM)
    spans = [Span(0, 2, 0, [1]), Span(2, 4, 0, [2]), Span(6, 3, 0, [3])]
    rng = torch.Generator().manual_seed(0)
    query, new = torch.randn(9, HEADS, DIM, generator=rng), torch.randn(9, 2, KV_HEADS, DIM, generator=rng)

    def attended() -> torch.Tensor:
        batch = PagedBatch(cache.clone(), PAGE, spans, (None,))
        batch.write(0, new)
        return attend_paged(batch, 0, query, new, Softmax())

    healthy = attended()
    new[2:6] = torch.nan
    out = attended()
    assert torch.equal(out[:2], healthy[:2])
    assert torch.equal(out[6:], healthy[6:])
    assert out[2:6].isnan().all()
