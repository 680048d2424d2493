"""Paged attention with windows, soft caps and sinks against its definition, one query and one key at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from overtone.models.attention import DecodeGroup, PagedBatch, PromptChunk, paged_attention

KV_HEADS, GROUP, DIM = 2, 2, 4
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
    order = torch.randperm(sum(lengths), generator=rng) + 1  # slot 0 pads
    slots = list(order.split(lengths))
    keys, values = [random(n, KV_HEADS, DIM) for n in lengths], [random(n, KV_HEADS, DIM) for n in lengths]
    cache = torch.zeros(1, 2, sum(lengths) + 1, KV_HEADS, DIM, dtype=torch.float64)
    for where, k, v in zip(slots, keys, values, strict=True):
        cache[0, 0, where], cache[0, 1, where] = k, v
    new = [slice(past, None) for past, _ in parts]
    query = [random(tokens, HEADS, DIM) for _, tokens in parts]
    batch = PagedBatch(
        cache, torch.cat([s[n] for s, n in zip(slots, new, strict=True)]),
        _group(decodes, slots), _chunks(len(decodes), parts, slots), (window,),
    )  # fmt: skip
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


def _group(lengths: list[int], slots: list[torch.Tensor]) -> tuple[DecodeGroup, ...]:
    if not lengths:
        return ()
    table = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in enumerate(lengths):
        table[row, :n] = slots[row]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return (DecodeGroup(torch.arange(len(lengths)), table, mask[:, None, None]),)


def _chunks(start: int, parts: list[tuple[int, int]], slots: list[torch.Tensor]) -> tuple[PromptChunk, ...]:
    found, at = [], start
    for (past, tokens), where in list(zip(parts, slots, strict=True))[start:]:
        found.append(PromptChunk(at, at + tokens, past, where))
        at += tokens
    return tuple(found)


def test_no_more_is_read_than_the_window_holds() -> None:
    slots = torch.arange(1, 21)[None].expand(2, -1)
    mask = torch.arange(20) < torch.tensor([[20], [3]])
    group = DecodeGroup(torch.arange(2), slots, mask[:, None, None])
    assert group.within(20) is group
    near = group.within(4)
    assert near.slots.tolist() == [[17, 18, 19, 20], [1, 2, 3, 4]]
    assert near.mask[:, 0, 0].tolist() == [[True] * 4, [True] * 3 + [False]]
    chunk = PromptChunk(5, 8, 17, torch.arange(1, 21)).within(4)
    assert (chunk.start, chunk.stop, chunk.past, chunk.slots.tolist()) == (5, 8, 3, [15, 16, 17, 18, 19, 20])
    seen = chunk.mask()
    assert seen is not None
    assert seen.int().tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
