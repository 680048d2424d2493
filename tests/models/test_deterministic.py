"""Deterministic mode: a request's logits, to the last bit, are those of the request alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from overtone.adapters.resident import make_resident
from overtone.engine.config import EngineConfig
from overtone.engine.types import Request
from overtone.errors import UnsupportedModel
from overtone.kernels import IDENTITY, Delta, LowRankCore, Term
from overtone.kernels.native import native_kernels
from overtone.models.base import BaseModel, prepare
from overtone.models.blocks import RowWise, by_blocks, interchangeable_sizes
from overtone.models.packed import PackedLinear
from support.architectures import tiny_architecture
from support.determinism import different, logits_of
from support.recorder import Recorder
from support.requests import make_request
from support.terms import KINDS, RandomTerms
from support.tiny import tiny_tokenizer

ALONE = EngineConfig(
    max_batch=1, max_step_tokens=512, max_context_tokens=200, page_tokens=4, cache_pages=60, deterministic=True
)
TOGETHER = {
    "roomy": EngineConfig(
        max_batch=16, max_step_tokens=256, max_context_tokens=200, page_tokens=4, cache_pages=600, deterministic=True
    ),
    "cramped": EngineConfig(
        max_batch=6, max_step_tokens=19, max_context_tokens=200, page_tokens=4, cache_pages=64, deterministic=True
    ),
}
"""The cramped one cuts prompts into many chunks and preempts."""


REQUESTS = 2 * len(KINDS) + 6
"""Nearly every adapter below twice."""


def deterministic(name: str = "llama") -> BaseModel:
    return prepare(tiny_architecture(name), tiny_tokenizer(), name, deterministic=True)


def low_rank(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Term:
    a, b = (torch.randn(size, generator=generator) for size in ((rank, shape[1]), (shape[0], rank)))
    return Term(IDENTITY, LowRankCore(a, b, 0.3 / (rank * shape[1]) ** 0.5), IDENTITY)


def adapters(base: BaseModel, seed: int) -> list[Mapping[str, Any] | None]:
    """The base model, LoRA of several ranks, one of each kind, and one of several kinds."""
    made: list[Mapping[str, Any] | None] = [None]
    for i, kinds in enumerate([[1], [2], [8], *([kind] for kind in KINDS), ["low_rank", "dct", "low_rank", "dft"]]):
        rng, generator = random.Random(seed + i), torch.Generator().manual_seed(seed + i)
        deltas = {}
        for name, shape in base.modules.items():
            if rng.random() < 0.6 and not any(extent % 4 for extent in shape):
                terms = RandomTerms(shape, seed + i, strength=0.2)
                made_of = (low_rank(shape, k, generator) if isinstance(k, int) else terms.make(k) for k in kinds)
                deltas[name] = Delta(tuple(made_of), shape)
        made.append(make_resident("x", "x", deltas).deltas)
    return made


def workload(base: BaseModel, seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    choices = adapters(base, seed)
    lengths = [1, 2, 5, 17, 40, 63, 64, 65, 90, 130]
    return [
        make_request(
            f"r{i}",
            [rng.randrange(1, base.vocab_size) for _ in range(rng.choice(lengths))],
            rng.randint(3, 14),
            adapter=choices[i % len(choices)],
            ignore_eos=True,
        )
        for i in range(count)
    ]


def check_together(base: BaseModel, config: EngineConfig, work: Sequence[Request]) -> Recorder:
    together, recorder = logits_of(base, config, work, early=4)
    for request in work:
        alone, _ = logits_of(base, ALONE, [request], early=1)
        wrong = different(alone[request.request_id], together[request.request_id])
        assert not wrong, f"{request.request_id}, prompt of {len(request.prompt_ids)}: after {wrong} tokens"
    return recorder


@pytest.mark.parametrize("config", TOGETHER)
@pytest.mark.parametrize("seed", [0, 100])
def test_a_request_has_the_logits_that_it_has_alone(config: str, seed: int) -> None:
    base = deterministic()
    recorder = check_together(base, TOGETHER[config], workload(base, seed, REQUESTS))
    preempted = sum(stats.preemptions for stats in recorder.stats)
    assert (preempted > 0) == (config == "cramped")
    assert max(stats.chunks for stats in recorder.stats) >= 4


@pytest.mark.parametrize(
    "name", ["qwen2-window", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"]
)
def test_other_architectures(name: str) -> None:
    base = deterministic(name)
    check_together(base, TOGETHER["cramped"], workload(base, 7, 8))


def test_the_ordinary_mode_does_differ() -> None:
    base = prepare(tiny_architecture("llama"), tiny_tokenizer(), "llama")
    work = workload(base, 0, REQUESTS)
    together, _ = logits_of(base, TOGETHER["cramped"], work, early=4)
    alone = {request.request_id: logits_of(base, ALONE, [request], early=1)[0] for request in work}
    assert any(different(alone[name][name], together[name]) for name in alone)


@pytest.mark.parametrize("layout", ["native", "oneDNN", "plain"])
@pytest.mark.parametrize(
    "shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 576), (77, 51), (7, 200), (1, 3), (130, 33)]
)
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(
    shape: tuple[int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "plain":
        monkeypatch.setattr("overtone.models.packed.packable", lambda weight: False)
    generator = torch.Generator().manual_seed(sum(shape))
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    layer = PackedLinear([weight], [bias], blocks=True, native=native_kernels() if layout == "native" else None)
    assert layer.layout == layout
    x = torch.randn(150, shape[1], generator=generator)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(alone.double(), x.double() @ weight.double().T + bias.double(), rtol=1e-4, atol=1e-3)
    for rows in (2, 3, 7, 16, 17, 31, 64, 65, 150):
        places = torch.randperm(150, generator=generator)[:rows]
        assert torch.equal(layer(x[places]), alone[places]), rows
    assert torch.equal(layer(x[None]), alone[None])
    assert layer(x[:0]).shape == (0, shape[0])


@settings(deadline=None)
@given(st.integers(0, 150), st.sets(st.sampled_from([1, 2, 4, 16, 32, 64]), min_size=1).map(sorted))
def test_blocks_cover_every_row_once(rows: int, sizes: list[int]) -> None:
    x = torch.arange(rows * 3.0).view(rows, 3)
    seen = []

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 2 * part

    assert torch.equal(by_blocks(double, x, sizes=sizes), 2 * x)
    assert set(seen) <= ({*sizes} if rows else {0})
    assert rows <= sum(seen) < rows + sizes[-1] or not rows


def test_sizes_that_give_other_bits_are_not_used() -> None:
    def of_count(x: torch.Tensor) -> torch.Tensor:
        return x + (1.0 if len(x) in (1, 32) else 0.0)

    def of_place(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(float(len(x)))[:, None]

    row = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert interchangeable_sizes(of_count, row) == (4, 16, 64)
    assert interchangeable_sizes(of_place, row) == ()


@pytest.mark.parametrize("width", [51, 96, 1530])
def test_an_activation_has_the_same_bits_in_any_batch(width: int) -> None:
    x = torch.randn(301, width, generator=torch.Generator().manual_seed(0))
    by_row = RowWise(nn.SiLU())
    alone = torch.cat([by_row(row[None]) for row in x])
    torch.testing.assert_close(alone, F.silu(x))
    for rows in (2, 7, 64, 301):
        assert torch.equal(by_row(x[:rows]), alone[:rows])
        assert torch.equal(by_row(x[None, -rows:]), alone[None, -rows:])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_products_that_are_not_ours_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="in its own way") as caught:
        deterministic(name)
    assert caught.value.field == "deterministic"


def test_pages_of_prompts_are_shared_and_those_of_answers_are_not() -> None:
    """The second conversation begins with the first one's prompt and answer, which it has in its prompt."""
    base, rng = deterministic(), random.Random(5)
    prompt = [rng.randrange(1, base.vocab_size) for _ in range(42)]
    first = make_request("first", prompt, 30, ignore_eos=True)
    _, recorder = logits_of(base, ALONE, [first], early=1)
    second = make_request("second", [*prompt, *recorder.tokens("first"), 3, 4], 6, ignore_eos=True)
    cached, recorder = logits_of(base, ALONE, [first, second], early=1)
    fresh, _ = logits_of(base, ALONE, [second], early=1)
    assert not different(cached["second"], fresh["second"])
    assert recorder.finish("second").cached_prompt_tokens == 40
